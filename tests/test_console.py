"""Who speaks: rank 0, and nobody in a quiet run."""

import json
import logging

import pytest

from hf_admm.console import get_logger, is_main_process, is_quiet, say
from launch import launch, needs_gloo


@pytest.mark.parametrize(("rank", "speaks"), [(None, True), ("0", True), ("3", False)])
def test_rank_0_speaks_before_the_processes_have_met(rank, speaks, monkeypatch, capsys, caplog):
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    assert is_main_process() is speaks
    say("hello")
    assert (capsys.readouterr().out == "hello\n") is speaks
    logger = get_logger("hf_admm.somewhere")
    assert get_logger("hf_admm.somewhere") is logger and len(logger.filters) == 1
    logger.warning("do this")
    logger.error("it failed here")
    assert [record.message for record in caplog.records] == (["do this"] if speaks else []) + ["it failed here"]


def test_every_module_speaks_by_it():
    import hf_admm.trainer  # noqa: F401

    known = logging.root.manager.loggerDict
    ours = {name: each for name, each in known.items() if name.startswith("hf_admm.")}
    ours = {name: each for name, each in ours.items() if isinstance(each, logging.Logger)}  # no mere parents
    assert {"hf_admm.trainer", "hf_admm.pruning.srste", "hf_admm.callbacks.phases"} <= set(ours)
    assert [name for name, each in ours.items() if not each.filters] == []


class Arguments:
    def __init__(self, level):
        self.level = level

    def get_process_log_level(self):
        return self.level


def test_quiet_is_a_level_of_logs_above_warnings(capsys):
    assert [is_quiet(Arguments(level)) for level in (10, 20, 30, 40, 50)] == [False, False, False, True, True]
    say("loud", Arguments(30))
    say("quiet", Arguments(40))
    assert capsys.readouterr().out == "loud\n"


@needs_gloo
def test_one_of_two_processes_speaks(tmp_path):
    """The tables on stdout, and a warning of both processes on stderr."""
    said = launch(2, "ddp_worker.py", tmp_path, 8, json.dumps([{"name": "run"}]), stdout=True)
    for line in ("hf_admm: BertForSequenceClassification to 2:4", "broken groups  0 of", "phase 1 has not converged"):
        assert said.count(line) == 1, (line, said)

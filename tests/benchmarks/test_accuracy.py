"""The command of the study: what it runs, in which order, and that it goes on where it was stopped."""

import pytest

from benchmarks import accuracy
from benchmarks.study import runs
from benchmarks.study.lines import append, read
from benchmarks.study.runs import Spec, execute


SPEC = Spec("sst2", "ours", "2:4", 1)


@pytest.fixture
def command(model_dir, data_dir, tmp_path):
    def run(*flags):
        where = ["--model_dir", model_dir, "--data_dir", data_dir, "--results", str(tmp_path / "accuracy.jsonl")]
        grid = ["--tasks", "sst2", "--seeds", "1", "2", "--patterns", "2:4", "--max_steps", "4", "--one_rate"]
        sizes = ["--methods", "dense", "asp", "rho0", "--precision", "float32", "--flags", "admm_steps=0.5"]
        accuracy.main([*where, *grid, *sizes, "--work_dir", str(tmp_path / "work"), *flags])
        return read(tmp_path / "accuracy.jsonl")

    return run


def test_a_stopped_study_goes_on(command, monkeypatch, capsys):
    made = []

    def dies(spec, *args):
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(spec)
        return execute(spec, *args)

    monkeypatch.setattr(accuracy, "execute", dies)
    with pytest.raises(KeyboardInterrupt):
        command()
    first = capsys.readouterr().out
    assert "[1/6, left unknown] sst2, dense, none, seed 1" in first and "[2/6, left 0 min] sst2, rho0" in first
    made.clear()
    monkeypatch.setattr(accuracy, "execute", lambda spec, *args: made.append(spec) or execute(spec, *args))
    lines = command("--share_switch")
    assert [(s.method, s.seed) for s in made] == [("rho0", 2), ("asp", 1), ("asp", 2)]
    assert len({line["key"] for line in lines}) == len(lines) == 6
    assert [line["from_switch"] for line in lines[3:]] == [False, False, True]
    made.clear()
    command()
    assert not made
    assert len(command("--flags", "admm_steps=0.25")) > 6 and made, "other settings are other runs"


def test_rates_may_be_named_in_place_of_those_of_the_methods():
    options = [
        "--tasks",
        "mrpc",
        "--seeds",
        "1",
        "--patterns",
        "1:4",
        "--methods",
        "ours",
        "sparsegpt",
        "--precision",
        "bf16",
    ]
    for flags, expected in (
        ([], [("ours", 1.0), ("sparsegpt", 1.0), ("sparsegpt", 2.0)]),
        (["--one_rate"], [("ours", 1.0), ("sparsegpt", 1.0)]),
        (["--rates", "2", "--one_rate"], [("ours", 2.0), ("sparsegpt", 2.0)]),
    ):
        specs = accuracy.grid(accuracy.options().parse_args([*options, *flags]))
        assert sorted((spec.method, spec.rate) for spec in specs) == expected


def test_variants_of_phase_2_go_on_from_a_kept_switch(command, tmp_path, monkeypatch):
    one = ("--methods", "rho0", "--seeds", "1", "--keep_switch")
    command(*one)
    command(*one, "--flags", "admm_steps=0.5", "srste_lr_multiplier=4")
    lines = command(*one, "--flags", "admm_steps=0.5", "mask_freeze_steps=0.5")
    assert [line["from_switch"] for line in lines] == [False, True, True]
    assert len(list((tmp_path / "work" / "switch").iterdir())) == 1
    command(*one, "--flags", "admm_steps=0.25")
    assert len(list((tmp_path / "work" / "switch").iterdir())) == 2, "another phase 1"
    monkeypatch.setattr(runs, "source_digest", lambda: "other")
    lines = command(*one, "--flags", "admm_steps=0.5", "mask_freeze_steps=0.25")
    assert not lines[-1]["from_switch"], "a state of other code"


def test_what_decides_first_runs_first(command, capsys):
    command("--dry_run", "--methods", "asp", "ours", "dense", "rho0", "--patterns", "2:4", "1:4")
    order = [line.split(maxsplit=3)[3] for line in capsys.readouterr().out.splitlines()]
    heads = ["sst2 dense none", "sst2 ours 2:4", "sst2 rho0 2:4"]
    assert order[:6] == [f"{head} seed {seed} rate x1" for seed in (1, 2) for head in heads]
    assert [line.split()[1:3] for line in order[-4:]] == 2 * [["asp", "2:4"]] + 2 * [["asp", "1:4"]]


def test_quick_is_one_task_and_seed(capsys):
    accuracy.main(["--quick", "--methods", "dense", "ours", "--dry_run"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all("mrpc" in line and "seed 1" in line for line in lines)


def test_flags_are_read():
    assert accuracy._flag("admm_rho=0.5") == ("admm_rho", 0.5)
    assert accuracy._flag("admm_update_steps=8") == ("admm_update_steps", 8)
    assert accuracy._flag("admm_penalty=decoupled") == ("admm_penalty", "decoupled")
    with pytest.raises(ValueError, match="give NAME=VALUE"):
        accuracy._flag("admm_rho")


def test_time_left_is_of_the_same_task(make_line):
    done = [make_line("ours", 0.5, "mrpc", seconds=100.0), make_line("ours", 0.5, "cola", seconds=300.0)]
    pending = [Spec("mrpc", "ours", "2:4", 1), Spec("rte", "ours", "2:4", 1)]
    assert accuracy.time_left(pending, done) == 100 + 200
    assert accuracy.time_left(pending, []) is None


def test_a_claimed_run_is_left_to_the_other(place, tmp_path, monkeypatch):
    monkeypatch.setattr(accuracy, "execute", lambda spec, *args: pytest.fail("made twice"))
    with accuracy.claimed(place.work_dir / "claims", SPEC.key):
        assert accuracy.run([SPEC], place, tmp_path / "results.jsonl") == []
    append(tmp_path / "results.jsonl", {"key": SPEC.key})
    assert len(accuracy.run([SPEC], place, tmp_path / "results.jsonl")) == 1

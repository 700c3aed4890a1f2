"""The benchmark of CPU serving: processes that answer, ratios within a round, and the table of the page."""

import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import BertConfig, BertModel

from benchmarks import runtimes, serving_cpu


class Answers:
    """A process whose time grows by a step each round, as on a machine that gets busier."""

    def __init__(self, factor, mib, calls):
        self.factor, self.mib, self.calls = factor, mib, calls

    def ask(self, request):
        if request == "facts":
            return {"memory": {"now": self.mib, "peak": 2 * self.mib}, "kernels": {"brgemm": 3}}
        self.calls.append(self.factor)
        load = 1 + (len(self.calls) - 1) // 3
        return {"cpu": self.factor * load, "wall": 10 * self.factor * load}


@pytest.fixture
def started():
    calls = []
    factors = {("PyTorch", "dense"): (1.0, 100), ("PyTorch", "2:4"): (1.5, 100), ("OpenVINO", "2:4"): (0.5, 40)}
    return calls, {contender: Answers(*figures, calls) for contender, figures in factors.items()}


def test_ratios_are_taken_within_a_round(started, capsys):
    _, processes = started
    rows = serving_cpu.compare("Tiny", processes, SimpleNamespace(batch_sizes=[1], rounds=4, seconds=60))
    times = {(row["runtime"], row["weights"]): row for row in rows if "batch" in row}
    assert times["OpenVINO", "2:4"]["result"]["rounds"] == [0.5] * 4  # whatever the load of the round
    assert times["PyTorch", "2:4"]["wall"]["median"] == 1.5
    memory = {row["figure"]: row["result"]["median"] for row in rows if "batch" not in row}
    assert memory["Tiny, OpenVINO, 2:4, peak of memory"] == 0.4 and len(memory) == 6
    assert all(row["headline"] is False for row in rows)
    table = serving_cpu.page_table(rows, "command")
    assert table.splitlines()[0] == "| Tiny | time, batch 1 | peak of memory | memory while it serves |"
    assert "| PyTorch | 1.00 / 1.50 | 1.00 / 1.00 | 1.00 / 1.00 |" in table
    assert "| OpenVINO | - / 0.50 | - / 0.40 | - / 0.40 |" in table and table.endswith("`command`")


@pytest.mark.parametrize(("seconds", "expected"), [(0, serving_cpu.LEAST_ROUNDS), (60, 7)])
def test_rounds_end_with_the_time_and_every_process_is_warm(started, seconds, expected):
    calls, processes = started
    answers = serving_cpu.measure(processes, 1, 7, seconds)
    assert {len(found) for found in answers.values()} == {expected}
    assert len(calls) == 3 * (expected + 1) and set(calls[:3]) == {1.0, 1.5, 0.5}


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(**sizes, max_position_embeddings=128)).save_pretrained(tmp_path)
    return tmp_path


def test_a_process_answers(folder):
    process = runtimes.Process("PyTorch", folder)
    try:
        answer = process.ask(2)
        assert 0 < answer["cpu"] and 0 < answer["wall"]
        memory = process.ask("facts")["memory"]
        assert 50 < memory["now"] <= memory["peak"]
    finally:
        process.stop()


def test_a_runtime_that_can_not_run_is_left_out_and_said_so(folder, monkeypatch):
    broken = runtimes.Runtime("none.onnx", runtimes.RUNTIMES["ONNX Runtime"].load)
    monkeypatch.setitem(serving_cpu.RUNTIMES, "ONNX Runtime", broken)
    skipped = {}
    started = serving_cpu.start({"dense": folder}, skipped, ["PyTorch", "ONNX Runtime"])
    for process in started.values():
        process.stop()
    assert list(started) == [("PyTorch", "dense")]
    assert list(skipped) == ["ONNX Runtime"] and skipped["ONNX Runtime"]


def test_every_form_of_a_model_is_written_or_said_to_be_missing(tmp_path, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "nncf", None)
    missing = serving_cpu.prepare(lambda: BertModel.from_pretrained(folder), True, tmp_path / "sparse")
    assert "int8.xml" in missing and (tmp_path / "sparse" / "model.safetensors").is_file()
    for file in ("model.onnx", "int8.onnx"):
        assert (tmp_path / "sparse" / file).is_file() != (file in missing)

"""Distillation on two processes is that on one: rows and tokens are counted over all of them."""

import pytest
import torch

from launch import launch, needs_gloo, trains_shards
from teacher_worker import build


@needs_gloo
@pytest.mark.parametrize("kind", ["trainer", pytest.param("sharded", marks=trains_shards)])
def test_two_processes_are_taught_as_one(kind, tmp_path):
    """By DDP in Trainer, and by FSDP2, which on a CPU is not to be had through Trainer. Batches of uneven length."""
    build(1).save_pretrained(tmp_path / "teacher")
    found = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        launch(processes, "teacher_worker.py", folder, tmp_path / "teacher", 8 // processes, kind)
        found.append([torch.load(folder / f"{rank}.pt") for rank in range(processes)])
    (one,), (first, second) = found
    if kind == "trainer":
        assert first["logs"] == second["logs"] == pytest.approx(one["logs"], rel=1e-4)
    assert len(first["weights"]) > 30 and first["weights"].keys() == one["weights"].keys()
    for name, weight in one["weights"].items():
        torch.testing.assert_close(first["weights"][name], weight, rtol=1e-4, atol=2e-6, msg=name)

"""Distillation on two processes is that on one: rows and tokens are counted over all of them."""

import pytest
import torch

from launch import launch, needs_gloo, trains_shards
from teacher_worker import build


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("taught")
    build(1).save_pretrained(folder / "teacher")
    kinds = ["trainer", "switch"] if trains_shards.args[0] else ["trainer", "switch", "sharded"]
    for processes in (1, 2):
        (folder / str(processes)).mkdir()
        launch(processes, "teacher_worker.py", folder / str(processes), folder / "teacher", 8 // processes, *kinds)
    return folder


@needs_gloo
@pytest.mark.parametrize("kind", ["trainer", "switch", pytest.param("sharded", marks=trains_shards)])
def test_two_processes_are_taught_as_one(kind, runs):
    """By DDP in Trainer, and by FSDP2, which on a CPU is not to be had through Trainer. Batches of uneven length."""
    one, first, second = (torch.load(runs / name) for name in (f"1/{kind}0.pt", f"2/{kind}0.pt", f"2/{kind}1.pt"))
    if kind != "sharded":
        assert (first["logs"][0] == 0) == (kind == "switch") and first["logs"][-1] > 0
        assert first["logs"] == second["logs"] == pytest.approx(one["logs"], rel=1e-4)
    assert len(first["weights"]) > 30 and first["weights"].keys() == one["weights"].keys()
    for name, weight in one["weights"].items():
        torch.testing.assert_close(first["weights"][name], weight, rtol=1e-4, atol=2e-6, msg=name)

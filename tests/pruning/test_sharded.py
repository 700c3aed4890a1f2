"""FSDP2: weights sharded among processes by `fully_shard` end as they do in one process."""

import json

import pytest
import torch
from safetensors.torch import load_file

from fsdp_worker import PATTERNS, PENALTIES, PHASE_1
from hf_admm import parse_pattern
from hf_admm.checkpoints.sidecar import SHARDED_SIDECAR_NAME, SIDECAR_NAME
from hf_admm.pruning.shards import local, straddles
from launch import launch, trains_shards


# Two processes average equal gradients to the same bits; three round.
TOLERANCE = {2: 0.0, 3: 2e-5}  # of steps of 0.01


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    for processes, resumed in ((2, ()), (3, (2,)), (1, (2, 3))):
        launch(processes, "fsdp_worker.py", folder / str(processes), *resumed)
    return folder


@trains_shards
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("processes", TOLERANCE)
def test_shards_train_as_the_whole(processes, penalty, pattern, runs):
    """Both phases: weights, evaluations on sparse weights in between, figures, and what a sidecar restores."""
    close = {"rtol": 0, "atol": TOLERANCE[processes]}
    one, many = (runs / str(count) / f"{penalty}-{pattern.replace(':', '-')}" for count in (1, processes))
    straight, sharded = torch.load(one / "results.pt"), torch.load(many / "results.pt")
    torch.testing.assert_close(sharded["weights"], straight["weights"], **close)
    torch.testing.assert_close(sharded["evaluations"], straight["evaluations"], **close)
    for step, phase in ((3, PHASE_1[penalty]), (8, "srste")):
        assert sharded["restored"][step]["phase"] == phase
        for part in ("weights", "evaluation"):
            torch.testing.assert_close(sharded["restored"][step][part], straight["restored"][step][part], **close)
        # The file is the same whatever the number of processes, so any other number can resume from it.
        files = [load_file(folder / str(step) / SIDECAR_NAME) for folder in (one, many)]
        torch.testing.assert_close(files[1], files[0], **close)
    figures = [json.loads((folder / "figures.json").read_text())["figures"] for folder in (one, many)]
    assert len(figures[0]) == 10 and "mask_flips" in figures[0][-1]
    assert ("primal_residual" in figures[0][-5]) is (penalty != "none")
    for expected, got in zip(*figures, strict=True):
        assert got == pytest.approx(expected, rel=1e-4)


@trains_shards
@pytest.mark.parametrize("processes", TOLERANCE)
def test_each_process_writes_its_own_shards(processes, runs):
    """The worker asserts that nothing is gathered meanwhile, and what other numbers of processes restore from them."""
    for step in (3, 8):
        place = runs / str(processes) / "loss-2-4" / "shards" / str(step) / SHARDED_SIDECAR_NAME
        shards = {f"__{rank}_0.distcp" for rank in range(processes)}
        assert {file.name for file in place.iterdir()} == shards | {".metadata", "header.json"}


@trains_shards
def test_only_groups_that_straddle_shards_are_gathered(runs):
    """Rows are divided: 24, 40 and 4 of them, as torch.chunk does, so in chunks of 12, 20, 2 or of 8, 14, 2."""
    found = {}
    for processes in TOLERANCE:
        for pattern in PATTERNS:
            figures = json.loads(
                (runs / str(processes) / f"loss-{pattern.replace(':', '-')}" / "figures.json").read_text()
            )
            found[processes, pattern] = {n.split(".")[2] for n in figures["straddle"] if n.startswith("layers.0.")}
    assert found[2, "2:4"] == set()  # Conv1D's groups run down the rows: 12 and 20 are multiples of 4
    assert found[3, "2:4"] == {"narrow"}  # 14 is not
    assert found[2, "4:8"] == {"conv", "narrow"}
    assert found[2, "4x4:8"] == {"small"}
    assert found[3, "4x4:8"] == {"uneven", "narrow", "small"}
    assert found[2, "0.5"] == {"even", "conv", "uneven", "narrow", "small"}


def test_a_plain_tensor_is_its_own_shard():
    weight = torch.ones(4, 8)
    assert local(weight) is weight
    assert not straddles(weight, parse_pattern("0.5"), False)

"""Two processes (gloo) train as one, resume on any number of processes, and never drift apart unnoticed."""

import json
import re

import pytest
import torch

from hf_admm import audit_checkpoint
from hf_admm.pruning.replicas import digest
from launch import launch, needs_gloo


# Per process, so that each run sees the same 16 examples a step.
BATCH_SIZE = {1: 16, 2: 8}


def run(processes, folder, *runs):
    """Runs in turn, each in its folder: a name, and what it resumes from or its fault."""
    launch(processes, "ddp_worker.py", folder, BATCH_SIZE[processes], json.dumps(runs), timeout=900)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """SGD, so that a penalty counted once per process would not be normalised away."""
    folder = tmp_path_factory.mktemp("runs")
    run(1, folder, {"name": "one"}, {"name": "calibrated_one"})
    again = {"name": "again", "resume": "two/checkpoint-3"}
    one_to_two = {"name": "one_to_two", "resume": "one/checkpoint-3"}
    faults = [{"name": fault, "fault": fault} for fault in ("weight", "anchor", "mask", "evaluated", "loss")]
    run(2, folder, {"name": "two"}, {"name": "calibrated_two"}, again, one_to_two, *faults)
    run(1, folder, {"name": "two_to_one", "resume": "two/checkpoint-9"})
    return folder


def weights(folder, rank=0):
    return torch.load(folder / f"rank{rank}.pt")


def errors(folder):
    """What the run ended with, on each of the two processes."""
    assert not (folder / "rank0.pt").exists()
    return [(folder / f"error{rank}.txt").read_text() for rank in range(2)]


def assert_close(found, others):
    for name, weight in found.items():
        torch.testing.assert_close(weight, others[name], rtol=1e-4, atol=2e-6, msg=name)


@needs_gloo
def test_two_processes_train_as_one(runs):
    one, first, second = weights(runs / "one"), weights(runs / "two"), weights(runs / "two", 1)
    assert all(torch.equal(first[name], second[name]) for name in one)
    assert_close(one, first)
    assert audit_checkpoint(runs / "two" / "model").ok


@needs_gloo
def test_two_processes_prune_by_the_same_rows_as_one(runs):
    one, two = runs / "calibrated_one", runs / "calibrated_two"
    one, first, second = weights(one), weights(two), weights(two, 1)
    assert all(torch.equal(first[name], second[name]) for name in one)
    assert_close(one, first)
    assert any(not torch.equal(weight, weights(runs / "one")[name]) for name, weight in one.items())


@needs_gloo
def test_a_resume_gives_the_same_bits(runs):
    resumed, straight = weights(runs / "again"), weights(runs / "two")
    assert all(torch.equal(resumed[name], weight) for name, weight in straight.items())


@needs_gloo
@pytest.mark.parametrize(("before", "after"), [("one", "two"), ("two", "one")])
def test_a_resume_on_another_number_of_processes(before, after, runs):
    """From step 3, in phase 1, and from step 9, in phase 2."""
    assert_close(weights(runs / f"{before}_to_{after}"), weights(runs / before))


@needs_gloo
@pytest.mark.parametrize("fault", ["weight", "anchor", "mask"])
def test_replicas_that_drift_apart_are_noticed(fault, runs):
    """One entry of one tensor is changed on the second process only; it is named, with what it has spoilt since."""
    name = "bert.encoder.layer.1.output.dense.weight"
    for error in errors(runs / fault):
        message = re.search(r"no longer hold the same values of: (.*?)\. Something changes", error)
        assert (name if fault == "weight" else f"{fault} of {name}") in message[1].split(", ")


@needs_gloo
def test_an_evaluation_before_training_leaves_no_two_models(runs):
    """accelerate takes the model for prepared then: plain Trainer trains another one on each process, in silence."""
    for error in errors(runs / "evaluated"):
        assert "no longer hold the same values of: bert.encoder" in error and "evaluate() before train()" in error


@needs_gloo
def test_a_bad_loss_on_one_process_stops_them_all(runs):
    """Each for itself, before its optimizer steps: none is left to wait for the others."""
    for error in errors(runs / "loss"):
        assert error.startswith("FloatingPointError: The norm of the gradients of step 8 is nan")
        assert "checkpoint-6. Resume from there" in error


# ---- The digest itself ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.bool])
def test_a_digest_sees_every_entry_and_its_place(dtype):
    matrix = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    matrix = matrix > 0 if dtype is torch.bool else matrix.to(dtype)
    digests = {digest(matrix).item(), digest(matrix.flip(0)).item(), digest(matrix.flip(1)).item()}
    for entry in range(matrix.numel()):
        changed = matrix.clone()
        changed.view(-1)[entry] = ~changed.view(-1)[entry] if dtype is torch.bool else changed.view(-1)[entry] * 1.01
        digests.add(digest(changed).item())
    assert len(digests) == 3 + matrix.numel()


def test_a_digest_sees_flips_that_leave_every_sum_as_it_is():
    """Masks of N:M patterns have the same sum in every row, and two flips may cancel in the columns."""
    mask = torch.tensor([[1, 0, 0, 1], [0, 1, 1, 0]], dtype=torch.bool).repeat(600, 2)
    digests = {digest(mask).item()}
    for row in range(0, 1200, 2):
        other = mask.clone()
        other[row : row + 2] = mask[row : row + 2].flip(0)
        digests.add(digest(other).item())
    assert len(digests) == 601

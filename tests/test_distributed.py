"""Two processes (gloo) train as one, resume on any number of processes, and never drift apart unnoticed."""

import re

import pytest
import torch

from hf_admm import audit_checkpoint
from hf_admm.pruning.replicas import digest
from launch import launch, needs_gloo


# Per process, so that each run sees the same 16 examples a step.
BATCH_SIZE = {1: 16, 2: 8}


def run(processes, folder, resume="", fault="", fails=False):
    folder.mkdir()
    stderr = launch(processes, "ddp_worker.py", folder, BATCH_SIZE[processes], resume, fault, fails=fails)
    return stderr if fails else [torch.load(folder / f"rank{rank}.pt") for rank in range(processes)]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """SGD, so that a penalty counted once per process would not be normalised away."""
    folder = tmp_path_factory.mktemp("straight")
    return folder, {processes: run(processes, folder / str(processes)) for processes in BATCH_SIZE}


def assert_close(weights, others):
    for name, weight in weights.items():
        torch.testing.assert_close(weight, others[name], rtol=1e-4, atol=2e-6, msg=name)


@needs_gloo
def test_two_processes_train_as_one(straight):
    folder, runs = straight
    (one,), (first, second) = runs[1], runs[2]
    assert all(torch.equal(first[name], second[name]) for name in one)
    assert_close(one, first)
    assert audit_checkpoint(folder / "2" / "model").ok


@needs_gloo
def test_a_resume_gives_the_same_bits(straight, tmp_path):
    folder, runs = straight
    resumed, _ = run(2, tmp_path / "run", folder / "2" / "checkpoint-3")
    assert all(torch.equal(resumed[name], weight) for name, weight in runs[2][0].items())


@needs_gloo
@pytest.mark.parametrize(("before", "after", "step"), [(1, 2, 3), (2, 1, 9)])
def test_a_resume_on_another_number_of_processes(before, after, step, straight, tmp_path):
    folder, runs = straight
    resumed, *_ = run(after, tmp_path / "run", folder / str(before) / f"checkpoint-{step}")
    assert_close(resumed, runs[before][0])


@needs_gloo
@pytest.mark.parametrize("fault", ["weight", "anchor", "mask"])
def test_replicas_that_drift_apart_are_noticed(fault, tmp_path):
    """One entry of one tensor is changed on the second process only; it is named, with what it has spoilt since."""
    stderr = run(2, tmp_path / "run", fault=fault, fails=True)
    message = re.search(r"no longer hold the same values of: (.*?)\. Something changes", stderr)
    name = "bert.encoder.layer.1.output.dense.weight"
    assert (name if fault == "weight" else f"{fault} of {name}") in message[1].split(", ")


@needs_gloo
def test_an_evaluation_before_training_leaves_no_two_models(tmp_path):
    """accelerate takes the model for prepared then: plain Trainer trains another one on each process, in silence."""
    stderr = run(2, tmp_path / "run", fault="evaluated", fails=True)
    assert "no longer hold the same values of: bert.encoder" in stderr and "evaluate() before train()" in stderr


@needs_gloo
def test_a_bad_loss_on_one_process_stops_them_all(tmp_path):
    """Each for itself, before its optimizer steps: none is left to wait for the others."""
    stderr = run(2, tmp_path / "run", fault="loss", fails=True)
    assert stderr.count("FloatingPointError: The norm of the gradients of step 8 is nan") >= 2
    assert "checkpoint-6. Resume from there" in stderr


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

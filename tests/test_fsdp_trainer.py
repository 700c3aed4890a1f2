"""Trainer driving FSDP2 with SHARDED_STATE_DICT, on two and three CPU processes: checkpoints in shards, one model."""

import json
from pathlib import Path

import pytest
import torch
from accelerate.utils import merge_fsdp_weights
from safetensors.torch import load_file
from transformers import BertForSequenceClassification

from hf_admm import audit_checkpoint
from hf_admm.checkpoints.distributed_files import FSDP_MODEL_NAME, load_shards, read_index
from hf_admm.checkpoints.sidecar import SHARDED_SIDECAR_NAME, SIDECAR_NAME
from hf_admm.cli import main as cli
from launch import launch, trains_shards


pytestmark = trains_shards
STEPS = (2, 4, 6, 8)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fsdp_trainer")
    for processes in (2, 3):
        launch(processes, "fsdp_trainer_worker.py", folder)
    return folder


def results(folder):
    return torch.load(folder / "results.pt")


def assert_same(weights, others):
    assert weights.keys() == others.keys()
    assert [name for name in weights if not torch.equal(weights[name], others[name])] == []


@pytest.mark.parametrize("step", STEPS)
def test_a_checkpoint_is_in_shards_and_sparse(runs, step):
    folder = runs / "straight" / f"checkpoint-{step}"
    assert {path.name for path in folder.iterdir()} == {
        SHARDED_SIDECAR_NAME, FSDP_MODEL_NAME, "optimizer_0", "hf_admm.json", "scheduler.pt", "trainer_state.json",
        "rng_state_0.pth", "rng_state_1.pth",
    }  # fmt: skip
    shards = [(folder / SHARDED_SIDECAR_NAME / f"__{rank}_0.distcp").stat().st_size for rank in (0, 1)]
    assert min(shards) > 0.9 * max(shards)  # neither holds what the other could
    report = audit_checkpoint(folder)
    assert report.ok and len(report.weights) > 12
    assert cli(["verify", str(folder), "--quiet"]) == 0


def test_the_end_is_one_file_that_loads_anywhere(runs):
    folder = runs / "straight" / "model"
    assert {path.name for path in folder.iterdir()} == {
        "model.safetensors", "config.json", "hf_admm.json", "training_args.bin"
    }  # fmt: skip
    assert cli(["verify", str(folder), "--quiet"]) == 0 and audit_checkpoint(folder).ok
    model = BertForSequenceClassification.from_pretrained(folder)
    assert_same(dict(model.named_parameters()), results(runs / "straight")["weights"])


@pytest.mark.parametrize("run", ["phase1", "phase2", "to_whole", "from_whole"])
def test_a_resume_ends_with_the_same_bits(runs, run):
    """Also from shards to whole files, and back."""
    assert_same(results(runs / run)["weights"], results(runs / "straight")["weights"])
    whole, shards = ((runs / run / "checkpoint-8" / name).exists() for name in (SIDECAR_NAME, SHARDED_SIDECAR_NAME))
    assert (whole, shards) == ((True, False) if run == "to_whole" else (False, True))


@pytest.mark.parametrize("step", [2, 6])
def test_a_resume_of_a_run_with_a_dense_half(runs, step):
    """Whose checkpoints hold nothing but the dense weights beside the sparse model, until it is pruned."""
    assert_same(results(runs / f"dense{step}")["weights"], results(runs / "dense")["weights"])
    folder = runs / "dense" / f"checkpoint-{step}"
    assert audit_checkpoint(folder).ok
    kinds = {name.split("/")[0] for name in read_index(folder / SHARDED_SIDECAR_NAME).state_dict_metadata}
    assert kinds == ({"weight"} if step == 2 else {"weight", "mask"})


def test_a_resume_on_three_processes_begins_with_the_same_bits(runs):
    assert_same(results(runs / "three")["at_2"], results(runs / "straight")["at_2"])
    assert (runs / "three" / "checkpoint-8" / SHARDED_SIDECAR_NAME / "__2_0.distcp").is_file()
    assert audit_checkpoint(runs / "three" / "model").ok


@pytest.mark.parametrize("step", [6, 8])
def test_shards_hold_what_the_file_holds(runs, step):
    file = load_file(runs / "to_whole" / f"checkpoint-{step}" / SIDECAR_NAME)
    folder = runs / "straight" / f"checkpoint-{step}" / SHARDED_SIDECAR_NAME
    index = read_index(folder)
    found = {n: torch.empty(t.size, dtype=t.properties.dtype) for n, t in index.state_dict_metadata.items()}
    load_shards(found, folder, index)
    assert_same({name: tensor.view(file[name].shape) for name, tensor in found.items()}, file)


def test_the_best_model_is_loaded_from_its_shards(runs):
    best = results(runs / "best")
    folder = Path(best["best"])
    losses = {log["step"]: log["eval_loss"] for log in json.loads(
        (runs / "best" / "checkpoint-8" / "trainer_state.json").read_text())["log_history"] if "eval_loss" in log
    }  # fmt: skip
    assert folder.name == f"checkpoint-{max(losses, key=losses.get)}" != "checkpoint-8"
    merge_fsdp_weights(str(folder / FSDP_MODEL_NAME), str(runs / "merged"))
    merged = load_file(runs / "merged" / "model.safetensors")
    assert_same({name: merged[name] for name in best["weights"]}, best["weights"])
    assert audit_checkpoint(runs / "best" / "model").ok

"""Models that are saved under other names than their parameters have: the record, the resume, the best model."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from architectures import ARCHITECTURES
from hf_admm import audit_checkpoint
from hf_admm.checkpoints.files import RECORD_NAME, WEIGHTS_NAME
from hf_admm.checkpoints.saved_names import load_renamed, saved_names
from tiny_runs import train


BY_NAME = {architecture.name: architecture for architecture in ARCHITECTURES}
VIT = BY_NAME["ViT"]
RENAMED = "vit.encoder.layer.0.attention.attention.query.weight"


@pytest.fixture
def saved(tmp_path):
    """A tiny ViT and the folder that it was saved in."""
    model = VIT.tiny()
    model.save_pretrained(tmp_path)
    return model, tmp_path


def assert_same(model, other):
    state = other.state_dict()
    assert [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, state[name])] == []


def test_the_record_speaks_of_the_names_in_the_file(tmp_path):
    trainer = train(VIT.tiny(), VIT.data(32), tmp_path)
    trainer.save_model(str(tmp_path))
    file = tmp_path / WEIGHTS_NAME
    tensors = load_file(file)
    recorded = json.loads((tmp_path / RECORD_NAME).read_text())["targets"]
    assert RENAMED in recorded and set(recorded) <= set(tensors) and len(recorded) == len(trainer.sparsity.targets)
    # By its zeros alone, a weight that has none would count as one that was never meant to be sparse.
    tensors[RENAMED].fill_(1.0)
    save_file(tensors, file, metadata={"format": "pt"})
    (failure,) = audit_checkpoint(tmp_path).failures
    assert (failure.name, failure.status) == (RENAMED, "broken")


def test_what_is_saved_as_it_is_keeps_its_name(tmp_path):
    model = BY_NAME["BERT"].tiny()
    model.save_pretrained(tmp_path)
    weights = dict(model.named_parameters())
    assert saved_names(model, weights, tmp_path) == {name: name for name in weights}


def test_what_is_saved_in_another_shape_has_no_name(tmp_path):
    model = BY_NAME["Mixtral"].tiny()
    model.save_pretrained(tmp_path)
    names = saved_names(model, dict(model.named_parameters()), tmp_path)
    lost = {f"model.layers.{layer}.mlp.experts.{name}" for layer in (0, 1) for name in ("gate_up_proj", "down_proj")}
    assert {name for name, _ in model.named_parameters()} - set(names) == lost
    assert names["model.layers.0.mlp.gate.weight"] == "model.layers.0.block_sparse_moe.gate.weight"


@pytest.mark.parametrize("name", ["ViT", "Mixtral", "Qwen3-MoE"])
def test_the_best_model_is_loaded_whole(name, tmp_path):
    architecture = BY_NAME[name]
    trainer = train(
        architecture.tiny(), architecture.data(32), tmp_path, save_strategy="steps", save_steps=3,
        eval_strategy="steps", eval_steps=3, load_best_model_at_end=True, metric_for_best_model="loss",
        greater_is_better=True,
    )  # fmt: skip
    best = Path(trainer.state.best_model_checkpoint)
    assert trainer.audit.ok and best.name != "checkpoint-12"  # of the highest loss, so an early one
    assert_same(trainer.model, architecture.model_class.from_pretrained(best))


def test_loading_is_exact_in_mixed_precision(tmp_path):
    model = VIT.tiny().bfloat16()
    model.classifier.float()
    model.save_pretrained(tmp_path)
    other = VIT.tiny(seed=1).bfloat16()
    other.classifier.float()
    if RENAMED in dict(other.named_parameters()):
        pytest.skip("this version of transformers names it as its files do")
    assert load_renamed(other, tmp_path)
    assert_same(model, other)
    assert {name: p.dtype for name, p in model.named_parameters()} == {n: p.dtype for n, p in other.named_parameters()}


def test_what_trainer_loads_itself_is_left_to_it(saved, tmp_path_factory):
    bert, folder = BY_NAME["BERT"].tiny(), tmp_path_factory.mktemp("bert")
    bert.save_pretrained(folder)
    other = BY_NAME["BERT"].tiny(seed=1)
    assert not load_renamed(other, folder)
    assert_same(other, BY_NAME["BERT"].tiny(seed=1))
    assert not load_renamed(torch.nn.Linear(2, 2), saved[1])  # no from_pretrained
    assert not load_renamed(saved[0], folder / "nothing")


def test_an_incomplete_checkpoint_changes_nothing(saved):
    _, folder = saved
    tensors = load_file(folder / WEIGHTS_NAME)
    del tensors[RENAMED]
    save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    other = VIT.tiny(seed=1)
    assert not load_renamed(other, folder)
    assert_same(other, VIT.tiny(seed=1))

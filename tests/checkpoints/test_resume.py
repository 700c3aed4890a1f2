"""Checkpoints and resume: sparse weights on disk, the dense ones in the sidecar, and the same bits after a resume."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

from hf_admm import ADMMTrainer, ADMMTrainingArguments, audit_checkpoint
from hf_admm.checkpoints.sidecar import SIDECAR_NAME
from hf_admm.sparsity.projections import broken_groups
from tiny_runs import SETTINGS, STEPS


def build(model, data, folder, **flags):
    settings = {**SETTINGS, "save_steps": 1, "save_total_limit": 20, **flags}
    args = ADMMTrainingArguments(output_dir=str(folder), **settings)

    def accuracy(prediction):
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    return ADMMTrainer(model=model, args=args, train_dataset=data, eval_dataset=data[:16], compute_metrics=accuracy)


def assert_same(model, other):
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, other.get_parameter(name)), name


VARIANTS = {
    "loss": {},
    "gradient": {"admm_penalty": "gradient"},
    "decoupled": {"admm_penalty": "decoupled"},
    "ramp": {"admm_rho_schedule": "linear"},
    "fixed": {"srste_mask": "fixed"},
    "lazy masks": {"mask_update_steps": 4},
    "distance, lazy masks": {"admm_rho": None, "mask_update_steps": 4},
    "accumulated": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
    "blocks": {"sparsity_pattern": "4x4:8"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_resume_at_every_step_ends_with_the_same_bits(variant, tiny_bert, token_data, tmp_path):
    """With dropout on. Steps 1 to 5 lie in phase 1, on and off its updates; 6 is the switch; the rest is phase 2."""
    data = token_data()
    straight = build(tiny_bert(), data, tmp_path, **VARIANTS[variant])
    straight.train()
    keys = ("loss", "grad_norm", "admm/primal_residual", "admm/mask_flips", "admm/penalty", "admm/phase")
    for step in range(1, STEPS) if variant == "loss" else (3, 4, 6, 9):
        resumed = build(tiny_bert(seed=1), data, tmp_path / "resumed", **VARIANTS[variant])
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert_same(straight.model, resumed.model)
        last = [[{key: log.get(key) for key in keys} for log in trainer.state.log_history if "loss" in log]
                for trainer in (straight, resumed)]  # fmt: skip
        assert last[0] == last[1]


def test_every_checkpoint_holds_sparse_weights_that_load_anywhere(tiny_bert, token_data, tmp_path):
    """And plain from_pretrained under plain Trainer gives the metrics that the run recorded."""
    data = token_data(64)
    trainer = build(tiny_bert(), data, tmp_path, eval_strategy="steps", eval_steps=1)
    trainer.train()
    recorded = {log["step"]: log for log in trainer.state.log_history if "eval_loss" in log}
    for step in range(1, STEPS + 1):
        folder = tmp_path / f"checkpoint-{step}"
        report = audit_checkpoint(folder)
        assert report.ok and len(report.sparse) == 12 and report.sparsity == pytest.approx(0.5)
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        args = TrainingArguments(str(tmp_path / "plain"), report_to="none", use_cpu=True, disable_tqdm=True)
        plain = Trainer(model, args, eval_dataset=data[:16], compute_metrics=trainer.compute_metrics).evaluate()
        assert plain["eval_loss"] == recorded[step]["eval_loss"]
        assert plain["eval_accuracy"] == recorded[step]["eval_accuracy"]


@pytest.mark.parametrize("step", [3, 9])
def test_the_sidecar_holds_the_dense_weights(step, tiny_bert, token_data, tmp_path):
    trainer = build(tiny_bert(), token_data(), tmp_path)
    trainer.train()
    sidecar = load_file(tmp_path / f"checkpoint-{step}" / SIDECAR_NAME)
    saved = load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors")
    kind = "anchor" if step == 3 else "mask"
    for name in trainer.sparsity.targets:
        dense, sparse = sidecar[f"weight/{name}"], saved[name]
        assert broken_groups(dense, trainer.args.pattern).any()
        assert torch.equal(sparse[sparse != 0], dense[sparse != 0])
        assert f"{kind}/{name}" in sidecar
    assert not list(tmp_path.glob("**/*.tmp"))


def test_a_final_save_is_plain(tiny_bert, token_data, tmp_path):
    trainer = build(tiny_bert(), token_data(), tmp_path)
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    assert audit_checkpoint(tmp_path / "model").ok
    assert not (tmp_path / "model" / SIDECAR_NAME).exists()
    record = json.loads((tmp_path / "model" / "hf_admm.json").read_text())
    assert record["pattern"] == "2:4" and set(record["targets"]) == set(trainer.sparsity.targets)
    assert_same(trainer.model, AutoModelForSequenceClassification.from_pretrained(tmp_path / "model"))


@pytest.mark.parametrize("best", [4, 9])
def test_the_best_model_is_sparse_in_either_phase(best, tiny_bert, token_data, tmp_path):
    """Its metrics are those recorded, and the zeros of another mask do not cut into it."""
    trainer = build(
        tiny_bert(), token_data(), tmp_path, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True,
        metric_for_best_model="score", greater_is_better=True, save_total_limit=1,
    )  # fmt: skip
    trainer.compute_metrics = lambda prediction: {
        "score": 1.0 if trainer.state.global_step == best else 0.0,
        "logits": float(prediction.predictions.astype("float64").sum()),
    }
    trainer.train()
    assert trainer.state.best_global_step == best and trainer.audit.ok
    recorded = next(log for log in trainer.state.log_history if log.get("eval_score") == 1.0)
    assert trainer.evaluate()["eval_logits"] == recorded["eval_logits"]
    assert audit_checkpoint(trainer.state.best_model_checkpoint).ok


def test_a_longer_run_goes_on_from_a_checkpoint(tiny_bert, token_data, tmp_path):
    data = token_data()
    build(tiny_bert(), data, tmp_path).train()
    longer = build(tiny_bert(), data, tmp_path, max_steps=16)
    longer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))
    assert longer.state.global_step == 16 and longer.audit.ok


@pytest.mark.parametrize("flags", [{"admm_rho": 0.05}, {"max_steps": 40, "admm_steps": 30}])
def test_rho_never_falls_on_a_resume(flags, tiny_bert, token_data, tmp_path, caplog):
    """Given a lower one, or a ramp that is longer than before: Z could not be read off the anchors any more."""
    data = token_data()
    build(tiny_bert(), data, tmp_path, admm_rho_schedule="linear").train()
    resumed = build(tiny_bert(), data, tmp_path, **{"admm_rho_schedule": "linear", **flags})
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    rhos = [log["admm/rho"] for log in resumed.state.log_history if log.get("admm/phase") == 1]
    assert rhos == sorted(rhos) and "It can't fall within phase 1" in caplog.text and resumed.audit.ok


# ---- Bad input ----


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny_bert, token_data):
    folder = tmp_path_factory.mktemp("run")
    build(tiny_bert(), token_data(), folder, max_steps=4, admm_steps=2, save_steps=3).train()
    return folder / "checkpoint-3"


def refuse(checkpoint, model, data, tmp_path, match, **flags):
    trainer = build(model, data, tmp_path, **flags)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(ValueError, match=match):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])  # refused before anything was loaded


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        ({"sparsity_pattern": "1:4"}, r"trained with sparsity_pattern='2:4', this run has '1:4'"),
        ({"sparsity_pattern": "none"}, r"checkpoint of a sparse run \(pattern 2:4\), this run has .*'none'"),
        (
            {"sparsity_exclude": ["layer.0.attention.self.query", "layer.1.output.dense"]},
            r"other targets. In the checkpoint only: .*layer.0.attention.self.query.*layer.1.output.dense",
        ),
    ],
)
def test_a_resume_with_other_settings_is_refused(flags, match, checkpoint, tiny_bert, token_data, tmp_path):
    refuse(checkpoint, tiny_bert(), token_data(), tmp_path, match, **flags)


def test_a_resume_without_the_sidecar_is_refused(tiny_bert, token_data, tmp_path):
    build(tiny_bert(), token_data(), tmp_path, save_only_model=True, save_steps=6).train()
    match = f"has no {SIDECAR_NAME}.*save_only_model=True.*from_pretrained"
    refuse(tmp_path / "checkpoint-6", tiny_bert(), token_data(), tmp_path, match)


@pytest.mark.parametrize("damage", ["truncated", "foreign", "garbled", "newer"])
def test_a_damaged_sidecar_is_refused(damage, checkpoint, tiny_bert, token_data, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in checkpoint.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    path: Path = copy / SIDECAR_NAME
    tensors = load_file(path)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:1000])
    elif damage == "foreign":
        save_file(tensors, path)
    elif damage == "garbled":
        save_file(tensors, path, metadata={"hf_admm": "{not json"})
    else:
        save_file(tensors, path, metadata={"hf_admm": json.dumps({"format_version": 99})})
    match = "has format version 99" if damage == "newer" else "can't be read as the sidecar"
    refuse(copy, tiny_bert(), token_data(), tmp_path, match)


def test_a_sidecar_of_another_model_is_refused(checkpoint, tiny_bert, token_data, tmp_path):
    match = "was trained with other shapes of: .*query.*Resume with the model that the checkpoint was trained from"
    refuse(checkpoint, tiny_bert(hidden_size=48), token_data(), tmp_path, match)

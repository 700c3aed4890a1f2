"""What every integration must do, in both phases."""

import json
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import TrainerCallback

from hf_admm import audit_checkpoint
from hf_admm.sparsity.projections import broken_groups
from tiny_runs import assert_same_weights, weights


# Four steps of each phase, with a checkpoint and an evaluation in the middle of each and at its end.
PHASE_1, PHASE_2 = (2, 4), (6, 8)
FLAGS = {
    "max_steps": 8,
    "admm_steps": 4,
    "admm_update_steps": 1,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "save_strategy": "steps",
    "save_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 2,
}
# Pruned by its data at the switch, with a mask that goes on moving.
CALIBRATED = {"num_calibration_samples": 6, "srste_mask": "dynamic"}


def texts(*columns, rows=16):
    """Letters that no two rows and columns have alike, of several lengths; a column may be appended to another."""
    return Dataset.from_dict(
        {
            column: [
                "".join(f"{chr(97 + (7 * i + 5 * j + k) % 26)} " for k in range(2 + (i + j) % 5)) for i in range(rows)
            ]
            for j, column in enumerate(columns)
        }
    )


def obeys(trainer):
    """Whether the live model obeys the pattern at this moment."""
    parameters = dict(trainer.model.named_parameters())
    targets = trainer.sparsity.targets
    return bool(targets) and not any(
        broken_groups(parameters[name].detach(), trainer.args.pattern, target.transposed).any()
        for name, target in targets.items()
    )


class Watch(TrainerCallback):
    """Whether the model is sparse where a batch is evaluated, and where training computes, by step."""

    def __init__(self, trainer):
        self.trainer, self.evaluated, self.computed = trainer, {}, {}
        trainer.add_callback(self)
        trainer.model.register_forward_pre_hook(
            lambda *_: self.note(self.computed) if trainer.model.training else None
        )

    def note(self, seen):
        seen.setdefault(self.trainer.state.global_step, []).append(obeys(self.trainer))

    def on_prediction_step(self, args, state, control, **kwargs):
        self.note(self.evaluated)


def places(checkpoint):
    """The folders of a checkpoint that hold sparse weights."""
    return [record.parent for record in Path(checkpoint).rglob("hf_admm.json")]


def assert_sparse_checkpoint(trainer, checkpoint):
    found = places(checkpoint)
    recorded = [len(json.loads((place / "hf_admm.json").read_text())["targets"]) for place in found]
    assert sum(recorded) == len(trainer.sparsity.targets) > 0
    assert all(audit_checkpoint(place).ok for place in found)


def logged(trainer, metric="eval_loss"):
    return {log["step"]: log[metric] for log in trainer.state.log_history if metric in log}


def check(make, folder, model, metrics=("eval_loss",), same_bits=True):
    """
    Trains, and checks patterns, evaluations, checkpoints, resume and model card. `make(folder, model, **flags)` makes
    a trainer; `model` is the folder to start from.
    """
    trainer = make(folder / "straight", model)
    watch = Watch(trainer)
    trainer.train()
    assert trainer.audit.ok and obeys(trainer)
    assert bool(logged(trainer, "admm/output_change")) is bool(trainer.args.num_calibration_samples)
    assert sorted(watch.evaluated) == [*PHASE_1, *PHASE_2] and all(map(all, watch.evaluated.values()))
    # Phase 1 trains dense weights, phase 2 computes with masked ones in every pass.
    assert all(all(seen) for step, seen in watch.computed.items() if step >= PHASE_1[-1])
    assert len(watch.computed) == 8 and not all(watch.computed[1])
    for step in (*PHASE_1, *PHASE_2):
        checkpoint = folder / "straight" / f"checkpoint-{step}"
        assert_sparse_checkpoint(trainer, checkpoint)
        if metrics:  # of what is loaded without this package
            figures = make(folder / "loaded", str(checkpoint), sparsity_pattern="none").evaluate()
            for metric in metrics:
                assert figures[metric] == pytest.approx(logged(trainer, metric)[step], rel=1e-6)
    trainer.create_model_card()
    card = (folder / "straight" / "README.md").read_text()
    assert "- hf-admm" in card and "2:4" in card and card.count("## Sparsity") == 1
    for step in (PHASE_1[0], PHASE_2[0]) if same_bits else ():
        resumed = make(folder / f"from-{step}", model)
        resumed.train(resume_from_checkpoint=str(folder / "straight" / f"checkpoint-{step}"))
        assert_same_weights(resumed.model, weights(trainer.model))
    return trainer


def check_best(make, folder, model, metric="eval_loss"):
    """The best model of a run, be it of phase 1 or 2, is the one that is loaded at its end."""
    for greater in (False, True):
        flags = {"load_best_model_at_end": True, "metric_for_best_model": metric, "greater_is_better": greater}
        trainer = make(folder / f"best-{greater}", model, save_total_limit=1, **flags)
        trainer.train()
        figures = logged(trainer, metric)
        best = (max if greater else min)(figures, key=figures.get)
        assert trainer.audit.ok and trainer.state.best_global_step == best
        assert trainer.evaluate()[metric] == pytest.approx(figures[best], rel=1e-6)
        kept = folder / f"best-{greater}" / f"checkpoint-{best}"
        assert trainer.state.best_model_checkpoint == str(kept)
        assert_sparse_checkpoint(trainer, kept)

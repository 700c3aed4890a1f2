"""The best model of a run: sparse whenever it was, and with the metrics that were recorded."""

from pathlib import Path

import pytest
from transformers import EarlyStoppingCallback

from hf_admm import ADMMTrainer, audit_checkpoint
from tiny_runs import assert_same_weights, prepare, train, weights


@pytest.mark.parametrize(("peak", "stop"), [(3, 5), (8, 10)])
def test_early_stopping_ends_with_the_best_model_in_either_phase(peak, stop, tiny_bert, token_data, tmp_path):
    trainer = prepare(
        tiny_bert(), token_data(), tmp_path, callbacks=[EarlyStoppingCallback(2)], eval_strategy="steps", eval_steps=1,
        save_strategy="best", load_best_model_at_end=True, metric_for_best_model="score", greater_is_better=True,
    )  # fmt: skip
    trainer.compute_metrics = lambda prediction: {
        "score": -abs(trainer.state.global_step - peak),
        "logits": float(prediction.predictions.astype("float64").sum()),
    }
    trainer.train()
    assert trainer.state.global_step == stop and trainer.state.best_global_step == peak and trainer.audit.ok
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name == f"checkpoint-{peak}" and audit_checkpoint(best).ok
    assert_same_weights(trainer.model, weights(type(trainer.model).from_pretrained(best)))
    recorded = {log["step"]: log["eval_logits"] for log in trainer.state.log_history if "eval_logits" in log}
    assert trainer.evaluate()["eval_logits"] == recorded[peak] != recorded[stop]
    assert not trainer.sparsity.phase.companions  # no room kept for what is over


def test_early_stopping_without_the_best_model_keeps_the_last(tiny_bert, token_data, tmp_path):
    trainer = prepare(
        tiny_bert(), token_data(), tmp_path, callbacks=[EarlyStoppingCallback(1)], eval_strategy="steps", eval_steps=1,
        metric_for_best_model="score", greater_is_better=True,
    )  # fmt: skip
    trainer.compute_metrics = lambda _: {"score": 0.0}
    trainer.train()
    assert trainer.state.global_step == 2 and trainer.audit.ok
    logged = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    assert trainer.evaluate()["eval_loss"] == logged[-1]


def test_a_best_checkpoint_that_is_gone_leaves_the_last_weights_sparse(tiny_bert, token_data, tmp_path):
    class Gone(ADMMTrainer):
        def _load_best_model(self):
            (Path(self.state.best_model_checkpoint) / "model.safetensors").unlink()
            super()._load_best_model()

    flags = {"eval_strategy": "steps", "eval_steps": 4, "save_strategy": "steps", "save_steps": 4}
    assert train(tiny_bert(), token_data(), tmp_path, Gone, load_best_model_at_end=True, **flags).audit.ok

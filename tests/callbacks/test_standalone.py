"""The callbacks that stand alone, in a plain Trainer."""

import re

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_admm import project, select_targets
from hf_admm.callbacks import PatternAuditCallback, SparsityMonitorCallback
from hf_admm.sparsity.patterns import parse_pattern
from tiny_runs import train


QUERY = "bert.encoder.layer.0.attention.self.query.weight"


class KeepZeros(TrainerCallback):
    """What a user of plain Trainer may do to keep zeros: they are zero again after each step."""

    def __init__(self, but=()):
        self.but, self.masks = but, {}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.masks = {name: weight != 0 for name, weight in model.named_parameters() if name not in self.but}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        with torch.no_grad():
            for name, mask in self.masks.items():
                model.get_parameter(name).mul_(mask)


@pytest.fixture
def sparse(tiny_bert):
    """A model whose default targets obey 2:4."""
    model, pattern = tiny_bert(), parse_pattern("2:4")
    for name in select_targets(model, pattern).targets:
        with torch.no_grad():
            model.get_parameter(name).copy_(project(model.get_parameter(name), pattern))
    return model


def plain(model, data, folder, callbacks=(), **flags):
    defaults = {"max_steps": 4, "logging_steps": 2, "report_to": "none", "save_strategy": "no", "use_cpu": True}
    args = TrainingArguments(str(folder), disable_tqdm=True, **{**defaults, **flags})
    return Trainer(model, args, train_dataset=data, callbacks=list(callbacks))


def test_the_monitor_logs_the_share_of_non_zero_entries(sparse, token_data, tmp_path):
    total = sum(sparse.get_parameter(name).numel() for name in select_targets(sparse, parse_pattern("2:4")).targets)
    with torch.no_grad():
        sparse.get_parameter(QUERY).zero_()
    trainer = plain(sparse, token_data(), tmp_path, [KeepZeros(), SparsityMonitorCallback(by_kind=True)])
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["step"] for log in logs] == [2, 4]
    for log in logs:
        assert log["sparsity/density"] == pytest.approx((total / 2 - 128) / total, abs=2e-3)
        assert log["sparsity/density/attention.self.query"] == pytest.approx(0.25, abs=2e-3)
        assert log["sparsity/density/output.dense"] == pytest.approx(0.5, abs=2e-3)
    assert len([name for name in logs[0] if name.startswith("sparsity/density/")]) == 6
    assert not [log for log in trainer.state.log_history if "loss" not in log and "sparsity/density" in log]


def test_the_monitor_reaches_every_tracker_by_the_trainer(tiny_bert, token_data, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer = plain(tiny_bert(), token_data(), tmp_path, report_to="tensorboard")
    trainer.add_callback(SparsityMonitorCallback(include=["query"], trainer=trainer))
    trainer.train()
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/sparsity/density")] == [(2, 1.0), (4, 1.0)]


def test_the_monitor_changes_nothing(tiny_bert, token_data, tmp_path):
    weights = []
    for callbacks in ([], [SparsityMonitorCallback(by_kind=True)]):
        trainer = plain(tiny_bert(), token_data(), tmp_path, callbacks)
        trainer.train()
        weights.append(dict(trainer.model.named_parameters()))
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())


def test_a_name_that_matches_nothing_is_refused_when_training_begins(tiny_bert, token_data, tmp_path):
    for callback in (SparsityMonitorCallback(include=["no_such"]), PatternAuditCallback(exclude=["no_such"])):
        with pytest.raises(ValueError, match="matches no layer with: no_such"):
            plain(tiny_bert(), token_data(), tmp_path, [callback]).train()
    with pytest.raises(ValueError, match="Pattern 2:5 does not fit 12 of 12 layers"):
        plain(tiny_bert(), token_data(), tmp_path, [PatternAuditCallback("2:5")]).train()
    with pytest.raises(ValueError, match="pattern"):
        PatternAuditCallback("two of four")


def test_the_audit_passes_a_run_that_keeps_its_zeros(sparse, token_data, tmp_path):
    audit = PatternAuditCallback("2:4")
    plain(sparse, token_data(), tmp_path, [KeepZeros(), audit], save_strategy="steps", save_steps=2).train()
    assert audit.report.ok and len(audit.report.weights) == 12


def test_the_audit_fails_plain_training_at_its_first_save(sparse, token_data, tmp_path):
    trainer = plain(sparse, token_data(), tmp_path, [PatternAuditCallback()], save_strategy="steps", save_steps=2)
    with pytest.raises(
        RuntimeError, match=r"12 of 12 weights break the pattern 2:4 when the model is saved at step 2"
    ):
        trainer.train()
    assert trainer.state.global_step == 2


def test_the_audit_fails_at_the_end_of_a_run_that_saves_nothing(sparse, token_data, tmp_path):
    keep = KeepZeros(but=[QUERY])
    with pytest.raises(RuntimeError) as error:
        plain(sparse, token_data(), tmp_path, [keep, PatternAuditCallback()]).train()
    message = str(error.value)
    assert re.search(rf"1 of 12 weights .* when training ends at step 4:\n  {QUERY}: \d+ of 64 groups", message)
    assert "ADMMTrainer" in message and "exclude" in message


def test_what_may_be_dense_is_left_out(sparse, token_data, tmp_path):
    for callback in (PatternAuditCallback(exclude=["query"]), PatternAuditCallback(include=["key", "value"])):
        plain(sparse, token_data(), tmp_path, [KeepZeros(but=[QUERY]), callback]).train()
        assert callback.report.ok


class Vandal(Trainer):
    """Writes other weights to the files than the model holds."""

    def _save(self, output_dir=None, state_dict=None):
        weight = self.model.get_parameter(QUERY)
        kept = weight.detach().clone()
        with torch.no_grad():
            weight.fill_(1.0)
        super()._save(output_dir, state_dict)
        with torch.no_grad():
            weight.copy_(kept)


def test_the_audit_reads_the_files_too(sparse, token_data, tmp_path):
    args = plain(sparse, token_data(), tmp_path, save_strategy="steps", save_steps=2).args
    trainer = Vandal(sparse, args, train_dataset=token_data(), callbacks=[KeepZeros(), PatternAuditCallback()])
    where = re.escape(f"1 of 12 weights break the pattern 2:4 in the files of {tmp_path / 'checkpoint-2'}")
    with pytest.raises(RuntimeError, match=where):
        trainer.train()


def test_the_audit_agrees_with_the_sparse_trainer(tiny_bert, token_data, tmp_path):
    """Its events see the sparse weights, in both phases."""
    audit = PatternAuditCallback()
    train(tiny_bert(), token_data(), tmp_path, callbacks=[audit], save_strategy="steps", save_steps=3)
    assert audit.report.ok


def test_a_transposed_weight_is_read_as_it_is_stored(tiny_gpt2, token_data, tmp_path):
    audit = PatternAuditCallback()
    train(tiny_gpt2(), token_data(labels=None), tmp_path, callbacks=[audit], save_strategy="steps", save_steps=6)
    assert audit.report.ok and any(weight.transposed for weight in audit.report.weights)

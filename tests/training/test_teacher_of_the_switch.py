"""`distill_teacher="switch"`: phase 1 trains the teacher of phase 2."""

import copy
import json

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import BertForSequenceClassification, Trainer
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_admm import ADMMTrainer, ADMMTrainingArguments, prune_one_shot
from hf_admm.checkpoints.teacher_files import SWITCH_WEIGHTS, TEACHER_RECORD
from hf_admm.training.distillation import hidden_distance
from hf_admm.training.teachers import become
from tiny_models import NO_DROPOUT
from tiny_runs import STEPS, Recorder, assert_same_weights, prepare, train, weights


# As a user gives them: nothing of a phase.
RECIPE = {"distill_teacher": "switch", "admm_steps": None, "admm_rho": None, "admm_update_steps": None}
SAVES = {"save_strategy": "steps", "save_steps": 3, "save_total_limit": 20}


def arguments(folder, **flags):
    return ADMMTrainingArguments(str(folder), use_cpu=True, **{"distill_teacher": "switch", **flags})


def test_what_is_taken_for_the_other_flags(tmp_path):
    """Half of the run trains the teacher, without a pull; then it is pruned by its data."""
    args = arguments(tmp_path)
    assert (args.phase_1_length, args.rho, args.calibration_samples, args.mask_mode) == (0.5, 0.0, 1024, "fixed")
    assert (args.phase_schedulers, args.lr_multiplier, args.hidden_weight) == ((None, None), 1.0, 1.0)
    assert arguments(tmp_path, sparsity_pattern="1:4").lr_multiplier == 2.0
    longer = arguments(tmp_path, admm_steps=0.7, admm_lr_scheduler_type="constant")
    assert (longer.phase_1_length, longer.calibration_samples) == (0.7, 1024)
    assert (longer.rho, longer.phase_schedulers[0]) == (0.0, "constant")
    assert arguments(tmp_path, admm_rho=0).calibration_samples == 1024
    cut = arguments(tmp_path, num_calibration_samples=0)
    assert (cut.phase_1_length, cut.rho, cut.mask_mode, cut.lr_multiplier) == (0.5, 0.0, "dynamic", 2.0)
    assert arguments(tmp_path, sparsity_pattern="1:4", admm_rho=0).lr_multiplier == 2.0
    # A flag of the penalty asks for two phases as they are without a teacher.
    assert arguments(tmp_path, admm_penalty="loss", num_calibration_samples=8).phase_1_length == 0.6
    for flags in ({"admm_penalty": "distance"}, {"admm_update_steps": 4}, {"admm_rho": 0.1}):
        pulled, without = arguments(tmp_path, **flags), arguments(tmp_path, **flags, distill_teacher=None)
        assert pulled.calibration_samples == 0 and pulled.rho == without.rho > 0
        assert pulled.phase_1_length == (without.phase_1_length or 0.6) and pulled.mask_mode == "dynamic"
        assert pulled.phase_schedulers == without.phase_schedulers
        assert pulled.lr_multiplier == without.lr_multiplier


@pytest.mark.parametrize("pattern", ["none", "own"])
def test_without_phases_there_is_no_such_teacher(pattern, tmp_path):
    with pytest.raises(ValueError, match=f"with sparsity_pattern='{pattern}' there are no phases: give another"):
        arguments(tmp_path, sparsity_pattern=pattern)


def test_phase_1_is_plain_training_and_its_model_teaches_phase_2(tiny_bert, token_data, tmp_path):
    """To the bits of plain `Trainer` up to the switch; then pruned as by hand; then by the distance by hand."""
    model, data = tiny_bert(**NO_DROPOUT["tiny_bert"]), token_data()
    plain = copy.deepcopy(model)
    before = Recorder("on_step_end", lambda state, model, **_: weights(model))
    inside = Recorder(
        "on_step_begin",
        lambda state, model, **_: (
            weights(model), trainer._has_teacher, copy.deepcopy(trainer._teacher.state_dict()),
        ),
    )  # fmt: skip
    flags = {**RECIPE, "distill_hidden_weight": 0.5}
    trainer = prepare(model, data, tmp_path, sparsity_pattern="2:4", callbacks=[before, inside], **flags)
    trainer.train()
    half = ADMMTrainingArguments(
        str(tmp_path), use_cpu=True, sparsity_pattern="none", max_steps=STEPS // 2, per_device_train_batch_size=8,
        learning_rate=1e-3, report_to="none", disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    Trainer(plain, half, train_dataset=data).train()
    assert_same_weights(plain, before.seen[STEPS // 2 - 1])
    assert [has for _, has, _ in inside.seen] == [False] * (STEPS // 2) + [True] * (STEPS // 2)
    assert trainer.audit.ok and trainer.sparsity.finished and trainer._teacher is None
    pruned = copy.deepcopy(plain)
    prune_one_shot(pruned, trainer_batches(data), "2:4")
    at_switch = inside.seen[STEPS // 2][0]
    for name in trainer.sparsity.weights.targets:
        assert torch.equal(at_switch[name], pruned.get_parameter(name)), name
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert ["distill/hidden" in log for log in logs] == [False] * (STEPS // 2) + [True] * (STEPS // 2)
    for name, tensor in inside.seen[-1][2].items():
        assert torch.equal(tensor, plain.state_dict()[name]), name
    # Of the batch of the first step of phase 2, whichever it is, the distance is that of the pruned model.
    distances = []
    for rows in trainer_batches(data):
        ours, theirs = (each.eval()(**rows, output_hidden_states=True).hidden_states for each in (pruned, plain))
        distances.append(hidden_distance(ours, theirs, rows["attention_mask"]).item())
    first = logs[STEPS // 2]["distill/hidden"]
    assert min(distances) * 0.5 < first < max(distances) * 2
    assert logs[STEPS // 2]["distill/loss"] == pytest.approx(0.5 * first, rel=1e-5)


def trainer_batches(data):
    from transformers import default_data_collator

    return [default_data_collator(data[start : start + 8]) for start in range(0, len(data), 8)]


class NoStates(BertForSequenceClassification):
    """As a loss in chunks: what is to be distilled is not there."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        outputs = super().forward(input_ids, attention_mask, labels=labels, **kwargs)
        return SequenceClassifierOutput(outputs.loss, outputs.logits)


class Draws(BertForSequenceClassification):
    """Also in evaluation, as ViTMAE does."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        input_ids = torch.where(torch.rand(input_ids.shape) < 0.2, 1, input_ids)
        return super().forward(input_ids, attention_mask, labels=labels, **kwargs)


def test_trying_the_teacher_draws_nothing(tiny_bert, token_data, tmp_path):
    ends = []
    for teacher in ("switch", None):
        at_switch = Recorder("on_step_end", lambda state, model, **_: weights(model))
        flags = RECIPE | {"distill_teacher": teacher, "num_calibration_samples": 8, "admm_steps": 6, "admm_rho": 0}
        train(tiny_bert(model_class=Draws), token_data(64), tmp_path, callbacks=[at_switch], **flags)
        ends.append(at_switch.seen[:5])
    for ours, theirs in zip(*ends, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_what_can_not_teach_is_told_at_the_first_step(tiny_bert, token_data, tmp_path):
    """And not at the switch."""
    trainer = prepare(tiny_bert(model_class=NoStates), token_data(64), tmp_path, **RECIPE)
    with pytest.raises(ValueError, match="returns no hidden states, which distill_hidden_weight is to distil"):
        trainer.train()
    assert trainer.state.global_step == 0
    logits = {"distill_hidden_weight": 0.0, "distill_logits_weight": 0.5}
    taught = train(tiny_bert(model_class=NoStates), token_data(64), tmp_path, **RECIPE, **logits)
    left = Recorder(
        "on_step_end", lambda state, **_: (state.global_step, dict(trainer._distances), trainer._distances_of)
    )
    trainer = prepare(tiny_bert(), token_data(64), tmp_path, callbacks=[left], **RECIPE)
    trainer.train()
    assert left.seen[0] == (1, {}, 0), "nor in the mean of the first ones"
    figures = [log["admm/phase"] for log in taught.state.log_history if "distill/logits" in log]
    assert set(figures) == {2}, "the step that tries it is not in the logs"


@pytest.mark.parametrize("flags", [RECIPE, {"distill_teacher": "switch"}], ids=["recipe", "two phases"])
def test_a_resume_from_before_at_and_after_the_switch(flags, tiny_bert, token_data, tmp_path):
    """To the same bits, with dropout, whatever model is given."""
    data = token_data()
    straight = train(tiny_bert(), data, tmp_path / "run", **flags, **SAVES)
    found = {path.name for path in (tmp_path / "run").iterdir()}
    assert SWITCH_WEIGHTS in found
    records = {step: tmp_path / "run" / f"checkpoint-{step}" / TEACHER_RECORD for step in (3, 6, 9, 12)}
    assert [record.is_file() for record in records.values()] == [False, False, True, True]
    assert json.loads(records[9].read_text())["teacher"] == "switch"
    for step in (3, 6, 9):
        resumed = prepare(tiny_bert(seed=7), data, tmp_path / "run", **flags, **SAVES)
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{step}"))
        assert_same_weights(resumed.model, weights(straight.model))
        logs = [[(log["loss"], log.get("distill/loss")) for log in each.state.log_history if "loss" in log]
                for each in (straight, resumed)]  # fmt: skip
        assert logs[0] == logs[1] and len(logs[0]) == STEPS


def test_a_checkpoint_that_lacks_it(tiny_bert, token_data, tmp_path):
    flags = {"distill_teacher": "switch", **SAVES}
    train(tiny_bert(), token_data(), tmp_path / "without", **flags | {"distill_teacher": None})
    trainer = prepare(tiny_bert(), token_data(), tmp_path / "new", **flags)
    with pytest.raises(ValueError, match="is the dense model that phase 1 ended with, and the checkpoint was"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "without" / "checkpoint-9"))
    trainer = prepare(tiny_bert(), token_data(), tmp_path / "new", **flags)
    trainer.train(resume_from_checkpoint=str(tmp_path / "without" / "checkpoint-3"))
    assert trainer.audit.ok
    (tmp_path / "new" / SWITCH_WEIGHTS).unlink()
    trainer = prepare(tiny_bert(), token_data(), tmp_path / "new", **flags)
    with pytest.raises(ValueError, match="is the dense model as it was at the switch, .* is missing beside it"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "new" / "checkpoint-9"))


def test_a_second_training_has_its_own_teacher(tiny_bert, token_data, tmp_path):
    trainer = train(tiny_bert(), token_data(), tmp_path, **RECIPE)
    seen = Recorder("on_step_begin", lambda state, model, **_: trainer._has_teacher)
    trainer.add_callback(seen)
    trainer.train()
    assert seen.seen == [False] * (STEPS // 2) + [True] * (STEPS // 2) and trainer.audit.ok


def test_figures_of_an_attempt_that_ran_out_of_memory_are_not_logged_in_phase_1(tiny_bert, token_data, tmp_path):
    """As `auto_find_batch_size` leaves them when it begins anew."""
    stale = Recorder("on_train_begin", lambda state, **_: trainer._distance_figures.update({"distill/loss": 9.0}))
    trainer = prepare(tiny_bert(), token_data(), tmp_path, callbacks=[stale], **RECIPE)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert ["distill/loss" in log for log in logs] == [False] * (STEPS // 2) + [True] * (STEPS // 2)


def test_without_a_phase_1_there_is_none(tmp_path):
    with pytest.raises(ValueError, match="with admm_steps=0 there is none: leave admm_steps away, or set .*'self'"):
        arguments(tmp_path, admm_steps=0)


@pytest.mark.parametrize(("steps", "phase"), [(STEPS, 2), (0.99, 2), (0.01, 1)])
def test_without_one_of_the_phases_it_has_nothing_to_teach(steps, phase, tiny_bert, token_data, tmp_path):
    said = f"with admm_steps={steps} phase {phase} has none of the run's {STEPS} optimizer steps.*longer"
    with pytest.raises(ValueError, match=said):
        train(tiny_bert(), token_data(), tmp_path, **RECIPE | {"admm_steps": steps})


def test_another_teacher_than_before_is_refused(tiny_bert, token_data, tmp_path):
    """Of a run's own models too, whose files lie in one folder."""
    flags, data = {"num_calibration_samples": 0, "admm_rho": None, **SAVES}, token_data()
    for who, other, reason in (
        ("self", "switch", "'switch' is not the teacher of .*checkpoint-9, 'self'"),
        ("switch", "self", "is missing beside it"),
    ):
        train(tiny_bert(), data, tmp_path / who, distill_teacher=who, **flags)
        trainer = prepare(tiny_bert(), data, tmp_path / who, distill_teacher=other, **flags)
        with pytest.raises(ValueError, match=reason):
            trainer.train(resume_from_checkpoint=str(tmp_path / who / "checkpoint-9"))


def test_a_teacher_takes_the_weights_of_a_wrapped_student(tiny_bert):
    """As activation checkpointing under FSDP2 wraps its layers."""
    student, teacher = tiny_bert(seed=1), tiny_bert(seed=2)
    layers = student.bert.encoder.layer
    for number, layer in enumerate(layers):
        layers[number] = checkpoint_wrapper(layer)
    assert any("_checkpoint_wrapped_module" in name for name, _ in student.named_parameters())
    become(teacher, student)
    assert_same_weights(teacher, weights(tiny_bert(seed=1)))


def test_the_start_is_written_once(tiny_bert, token_data, tmp_path, monkeypatch):
    """The switch is no reason to write it anew."""
    written, inner = [], ADMMTrainer._save_self
    monkeypatch.setattr(ADMMTrainer, "_save_self", lambda self, place: (written.append(place), inner(self, place)))
    train(tiny_bert(), token_data(), tmp_path, distill_teacher="self", **SAVES)
    assert len(written) == 1

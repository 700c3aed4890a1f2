"""A teacher's term: in the gradient once per optimizer step, in no evaluation, and gone from the model after it."""

import copy

import pytest
import torch
from transformers import BertConfig, BertForTokenClassification, Trainer

from hf_admm import ADMMTrainer, ADMMTrainerMixin
from hf_admm.training.distillation import hidden_distance, logits_distance
from tiny_models import NO_DROPOUT
from tiny_runs import STEPS, Recorder, assert_same_weights, gradients, prepare, train, weights


SGD = {"optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0.0}  # Adam would hide a factor
ONE_STEP = {"max_steps": 1, "admm_steps": 1, "admm_rho": 0.0, "mask_freeze_steps": 0, "max_grad_norm": 0.0}


def save(model, folder):
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def bert(tiny_bert):
    return tiny_bert(**NO_DROPOUT["tiny_bert"])


@pytest.fixture
def teacher(tiny_bert, tmp_path):
    """Another model of the same shape, with dropout, as a folder."""
    return save(tiny_bert(seed=1), tmp_path / "teacher")


def batch_of(data):
    return {key: torch.stack([torch.as_tensor(row[key]) for row in data]) for key in data[0]}


def padded(rows):
    """Rows of 3 to 8 tokens: what lies beyond must not be learned from."""
    for i, row in enumerate(rows):
        row["attention_mask"] = row["attention_mask"].clone()
        row["attention_mask"][3 + i % 6 :] = 0
        if row["labels"].ndim:
            row["labels"] = row["labels"].clone()
            row["labels"][3 + i % 6 :] = -100
    return rows


def first_gradients(model, data, folder, trainer_class=ADMMTrainer, **flags):
    take = Recorder("on_optimizer_step", lambda state, model=None, **_: gradients(model))
    trainer = train(model, data, folder, trainer_class, callbacks=[take], **{**ONE_STEP, **flags})
    return take.seen[0], trainer


# ---- The term itself ----


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_gradient_is_that_of_the_loss_by_hand(share, bert, tiny_bert, token_data, teacher, tmp_path):
    """One step on padded rows. The teacher has dropout in its config, which must be off."""
    data = padded(token_data(8))
    student, other = copy.deepcopy(bert), tiny_bert(seed=1).eval()
    found, trainer = first_gradients(
        bert, data, tmp_path / "run", distill_teacher=teacher, distill_logits_weight=share, distill_hidden_weight=0.7,
        distill_temperature=3.0, logging_steps=1,
    )  # fmt: skip
    batch = batch_of(data)
    # Training starts at weights that are not projected, with rho 0.
    ours = student(**batch, output_hidden_states=True)
    with torch.no_grad():
        theirs = other(**batch, output_hidden_states=True)
    logits = logits_distance(ours.logits, theirs.logits, 3.0)
    hidden = hidden_distance(ours.hidden_states, theirs.hidden_states, batch["attention_mask"])
    ((1 - share) * ours.loss + share * logits + 0.7 * hidden).backward()
    for name, gradient in gradients(student).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(ours.loss.item(), rel=1e-4)  # the task's alone
    assert log["distill/loss"] == pytest.approx((share * logits + 0.7 * hidden).item(), rel=1e-4)
    assert log["distill/hidden"] == pytest.approx(hidden.item(), rel=1e-4)
    assert log.get("distill/logits", logits.item()) == pytest.approx(logits.item(), rel=1e-4)
    assert ("distill/logits" in log) == bool(share)


def test_without_a_teacher_nothing_changes(tiny_bert, token_data, tmp_path, monkeypatch):
    """Bit for bit, with dropout: the code of distillation is passed by."""
    flags = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}
    plain = train(tiny_bert(), token_data(), tmp_path, **flags)
    assert not any(key.startswith("distill") for log in plain.state.log_history for key in log)
    monkeypatch.setattr("hf_admm.training.teaching.make_teacher", None)
    monkeypatch.setattr("hf_admm.training.teaching.counted_tokens", None)
    monkeypatch.setattr(ADMMTrainer, "training_step", Trainer.training_step)
    monkeypatch.setattr(ADMMTrainer, "get_batch_samples", Trainer.get_batch_samples)
    assert_same_weights(train(tiny_bert(), token_data(), tmp_path, **flags).model, weights(plain.model))


def test_a_teacher_draws_no_random_number(tiny_bert, token_data, teacher, tmp_path):
    """With dropout in both: a weight of next to nothing leaves the run as it is without a teacher."""
    plain = train(tiny_bert(), token_data(), tmp_path / "a")
    for who in (teacher, "self"):
        taught = train(tiny_bert(), token_data(), tmp_path / "b", distill_teacher=who, distill_hidden_weight=1e-30)
        assert_same_weights(taught.model, weights(plain.model))
        assert taught.state.log_history[0]["distill/hidden"] > 0


def test_self_is_the_dense_model_of_the_start(bert, token_data, tmp_path):
    start, seen = copy.deepcopy(bert), []

    class Looks(ADMMTrainer):
        def compute_loss(self, *args, **kwargs):
            seen.append(weights(self._teacher))
            return super().compute_loss(*args, **kwargs)

    trainer = train(bert, token_data(), tmp_path, Looks, distill_teacher="self", distill_logits_weight=0.5)
    for teacher in (seen[0], seen[-1]):
        assert_same_weights(start, teacher)
    assert trainer._teacher is None and trainer.args.hidden_weight == 0.1


def test_the_student_comes_nearer_to_its_teacher(bert, token_data, teacher, tmp_path):
    trainer = train(
        bert, token_data(), tmp_path / "run", distill_teacher=teacher, max_steps=60, admm_steps=30,
        learning_rate=3e-3, distill_logits_weight=0.5,
    )  # fmt: skip
    hidden = [log["distill/hidden"] for log in trainer.state.log_history if "loss" in log]
    assert hidden[-1] < 0.8 * hidden[0] and trainer.audit.ok


# ---- Once per optimizer step ----


def token_classifier(tiny_bert):
    config = tiny_bert(**NO_DROPOUT["tiny_bert"]).config.to_dict()
    torch.manual_seed(0)
    return BertForTokenClassification(BertConfig(**{**config, "num_labels": 64}))


@pytest.mark.parametrize("kind", ["rows", "regression", "tokens", "language model"])
def test_the_term_counts_once_per_step_under_accumulation(kind, tiny_bert, tiny_gpt2, token_data, tmp_path):
    """
    22 padded rows, 8 a step: every epoch ends in a short window, whose last batch is short too where batches are of 4.
    The learning rate is of the term alone: the task has no weight in it, which some models average over batches.
    """
    if kind == "language model":
        model, other = (tiny_gpt2(seed=seed, **NO_DROPOUT["tiny_gpt2"]) for seed in (0, 1))
    elif kind == "tokens":
        model, other = token_classifier(tiny_bert), token_classifier(tiny_bert)
        torch.nn.init.normal_(other.classifier.weight)
    else:
        labels = 1 if kind == "regression" else 2
        model, other = (tiny_bert(seed=seed, num_labels=labels, **NO_DROPOUT["tiny_bert"]) for seed in (0, 1))
    labels = {"rows": 2, "regression": 1}.get(kind)
    data, runs, logs = padded(token_data(22, labels=labels)), [], []
    for batch, accumulation in ((8, 1), (4, 2), (2, 4)):
        take = Recorder("on_step_end", lambda state, model=None, **_: weights(model))
        trainer = train(
            copy.deepcopy(model), data, tmp_path / str(batch), callbacks=[take], admm_rho=2.0,
            per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation,
            distill_teacher=save(other, tmp_path / "teacher"), distill_logits_weight=1.0,
            distill_hidden_weight=0.05, **SGD,
        )  # fmt: skip
        runs.append(take.seen)
        logs.append([log["distill/loss"] for log in trainer.state.log_history if "loss" in log])
    for found, log in zip(runs[1:], logs[1:], strict=True):
        assert len(log) == STEPS and log == pytest.approx(logs[0], rel=1e-4)
        for step, (one, many) in enumerate(zip(runs[0], found, strict=True)):
            for name in one:
                torch.testing.assert_close(one[name], many[name], rtol=1e-4, atol=2e-6, msg=f"{name} at step {step}")


def test_a_log_of_several_steps_is_their_mean(bert, token_data, teacher, tmp_path):
    logs = []
    for every in (1, 3):
        trainer = train(
            copy.deepcopy(bert), token_data(), tmp_path / "run", distill_teacher=teacher, logging_steps=every,
            per_device_train_batch_size=4, gradient_accumulation_steps=2,
        )  # fmt: skip
        logs.append([log["distill/loss"] for log in trainer.state.log_history if "loss" in log])
    assert logs[1] == pytest.approx([sum(logs[0][i : i + 3]) / 3 for i in range(0, STEPS, 3)], rel=1e-5)


# ---- Evaluations, and the model afterwards ----


def test_no_evaluation_has_the_term_and_no_trace_stays(bert, token_data, teacher, tmp_path):
    keys = set(bert.state_dict())
    trainer = prepare(
        bert, token_data(), tmp_path / "run", distill_teacher=teacher, distill_hidden_weight=1e3, eval_steps=4,
        eval_strategy="steps", save_strategy="steps", save_steps=4,
    )  # fmt: skip
    trainer.train()
    evaluations = [log for log in trainer.state.log_history if "eval_loss" in log]
    assert len(evaluations) == 3
    for log in evaluations:
        assert log["eval_loss"] < 3 and not any(key.startswith("distill") for key in log)
    expected = bert(**batch_of(token_data()[:16])).loss
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(expected), rel=1e-4)
    assert set(bert.state_dict()) == keys and "backward" not in vars(trainer.accelerator)
    for module in bert.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert bert(**batch_of(token_data()[:2])).hidden_states is None


def test_an_error_within_a_step_leaves_no_trace(bert, token_data, teacher, tmp_path):
    class Fails(ADMMTrainer):
        def compute_loss(self, model, *args, **kwargs):
            assert model._forward_hooks and "backward" in vars(self.accelerator)
            raise InterruptedError

    trainer = prepare(bert, token_data(), tmp_path / "run", Fails, distill_teacher=teacher)
    with pytest.raises(InterruptedError):
        trainer.train()
    assert not bert._forward_hooks and not bert._forward_pre_hooks and "backward" not in vars(trainer.accelerator)


# ---- Losses and steps of one's own ----


def owns(base):
    class Calls(base):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs.pop("labels")
            outputs = model(**inputs)
            loss = torch.nn.functional.cross_entropy(outputs.logits, labels)
            return (loss, outputs) if return_outputs else loss

    class Super(base):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs)

    class Looks(base):
        """At a reference first, from which nothing is to be learned."""

        def compute_loss(self, model, inputs, *args, **kwargs):
            with torch.no_grad():
                model(input_ids=inputs["input_ids"].flip(1))
            return super().compute_loss(model, inputs, *args, **kwargs)

    class Steps(base):
        """Without super()."""

        def training_step(self, model, inputs, num_items_in_batch=None):
            model.train()
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
            self.accelerator.backward(loss)
            return loss.detach()

    return {"calls the model": Calls, "calls super": Super, "looks first": Looks, "steps": Steps}


@pytest.mark.parametrize("where", ["above", "below"])
@pytest.mark.parametrize("what", ["calls the model", "calls super", "looks first", "steps"])
def test_the_term_joins_whoever_computes_the_loss(what, where, bert, token_data, teacher, tmp_path):
    flags = {"distill_teacher": teacher, "distill_logits_weight": 0.5}
    expected, _ = first_gradients(copy.deepcopy(bert), token_data(8), tmp_path / "a", **flags)
    own = owns(ADMMTrainer if where == "above" else Trainer)[what]
    own = own if where == "above" else type("Own", (ADMMTrainerMixin, own), {})
    found, _ = first_gradients(bert, token_data(8), tmp_path / "b", own, **flags)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-7, msg=name)


def test_what_has_no_place_for_the_term_is_refused(bert, token_data, teacher, tmp_path):
    class Backward(ADMMTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = self.compute_loss(model.train(), self._prepare_inputs(inputs))
            loss.backward()
            return loss.detach()

    class Elsewhere(ADMMTrainer):
        def compute_loss(self, model, inputs, **kwargs):
            return next(model.parameters()).sum()

    for own, message in ((Backward, "Backward.training_step did not hand its loss to self.accelerator.backward"),
                         (Elsewhere, "Elsewhere.compute_loss did not call the model that it was given")):  # fmt: skip
        trainer = prepare(copy.deepcopy(bert), token_data(), tmp_path / "run", own, distill_teacher=teacher)
        with pytest.raises(ValueError, match=message):
            trainer.train()

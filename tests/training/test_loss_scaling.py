"""A loss that is a plain mean is averaged over a step; every other is scaled exactly as by plain Trainer."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForTokenClassification, GPT2Config, GPT2ForSequenceClassification, Trainer

from hf_admm import ADMMTrainer, ADMMTrainerMixin
from hf_admm.training.loss_scaling import LossScalingMixin
from tiny_runs import NO_DROPOUT, STEPS, Recorder, prepare, train, weights


SGD = {"optim": "sgd", "learning_rate": 0.05, "admm_rho": 2.0}  # Adam would hide a factor in its normalisation
SPLITS = ((8, 1), (2, 4))


def uneven(rows):
    """Rows with 1 to 7 labels, so that a mean of means is not the mean over a step."""
    for i, row in enumerate(rows):
        row["labels"] = row["labels"].clone()
        row["labels"][2 + i % 7 :] = -100
    return rows


def runs_of(model, data, folder, trainer_class=ADMMTrainer, parts=None, **flags):
    """The weights and the logged loss of each step, in one batch a step and in four; and the last trainer."""
    seen, logs = [], []
    for batch, accumulation in SPLITS:
        take = Recorder("on_step_end", lambda state, model=None, **_: weights(model))
        trainer = train(
            copy.deepcopy(model), data, folder, trainer_class, callbacks=[take], parts=parts,
            per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, **{**SGD, **flags},
        )  # fmt: skip
        seen.append(take.seen)
        logs.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    return seen, logs, trainer


def assert_independent_of_the_split(seen, logs):
    for step, (one, many) in enumerate(zip(*seen, strict=True)):
        for name in one:
            torch.testing.assert_close(one[name], many[name], rtol=1e-4, atol=2e-6, msg=f"{name} at step {step}")
    assert len(logs[0]) == STEPS and logs[0] == pytest.approx(logs[1], rel=1e-3)


class Wrapper(nn.Module):
    """A model of one's own around a transformer, whose source says nothing about the count."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.config = inner, inner.config


class Hands(Wrapper):
    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        return self.inner(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **kwargs)


class Divides(Wrapper):
    """Its own sum over a count under another name."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, **extra):
        logits = self.inner(input_ids=input_ids, attention_mask=attention_mask).logits[:, :-1]
        given = [value for name, value in extra.items() if name.startswith("num_items")]
        total = nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
        return total / (given[0] if given else (labels[:, 1:] != -100).sum()), logits


class DividesInTraining(Hands):
    """In evaluation it looks like a plain mean."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        return super().forward(input_ids, attention_mask, labels, **(kwargs if self.training else {}))


class Means(Wrapper):
    """Accepts the count, speaks of num_items_in_batch, and returns a mean."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, num_items_in_batch=None, **kwargs):
        return self.inner(input_ids=input_ids, attention_mask=attention_mask, labels=labels)


class MeansInTraining(Means):
    """Without a loss in evaluation."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        outputs = super().forward(input_ids, attention_mask, labels, **kwargs)
        return outputs if self.training else {"logits": outputs.logits}


# ---- Models that use the count ----


@pytest.mark.parametrize("wrapper", [None, Hands, Divides, DividesInTraining])
def test_a_model_that_uses_the_count_is_exact_under_accumulation(wrapper, tiny_gpt2, token_data, tmp_path):
    model = tiny_gpt2(**NO_DROPOUT["tiny_gpt2"])
    model = wrapper(model) if wrapper else model
    data = uneven(token_data(labels=None))

    class Shifts(ADMMTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self._loss_shifts_labels = True  # the first token has no target; Trainer can't know it of a wrapper

    seen, logs, trainer = runs_of(model, data, tmp_path, Shifts)
    assert_independent_of_the_split(seen, logs)
    assert trainer.model_accepts_loss_kwargs


# ---- Models that return a plain mean ----


def sequence_classifier(tiny_gpt2, **config):
    base = tiny_gpt2(**NO_DROPOUT["tiny_gpt2"]).config.to_dict()
    torch.manual_seed(0)
    return GPT2ForSequenceClassification(GPT2Config(**{**base, "pad_token_id": 0, **config}))


@pytest.mark.parametrize("kind", ["bert", "means", "means in training", "regression", "several labels"])
def test_a_plain_mean_is_averaged(kind, tiny_bert, tiny_gpt2, token_data, tmp_path):
    model, data = tiny_bert(**NO_DROPOUT["tiny_bert"]), token_data()
    if kind.startswith("means"):
        model = (Means if kind == "means" else MeansInTraining)(model)
    elif kind == "regression":
        model, data = sequence_classifier(tiny_gpt2, num_labels=1), token_data(labels=1)
    elif kind == "several labels":
        model = sequence_classifier(tiny_gpt2, num_labels=3, problem_type="multi_label_classification")
        for row in data:
            row["labels"] = torch.tensor([1.0, 0.0, float(row["labels"])])
    seen, logs, trainer = runs_of(model, data, tmp_path)
    assert_independent_of_the_split(seen, logs)
    assert not trainer.model_accepts_loss_kwargs


def test_a_batch_without_labels_leaves_the_question_to_the_next(tiny_bert, token_data, tmp_path):
    """The mean over no label is NaN with and without a count; so is the loss that is asked for at the first step."""
    config = BertConfig(**{**tiny_bert(**NO_DROPOUT["tiny_bert"]).config.to_dict(), "num_labels": 3})
    data = token_data(labels=None)
    for row in data:
        row["labels"] = row["labels"] % 3
    for row in data[:2]:
        row["labels"] = torch.full_like(row["labels"], -100)
    trainer = prepare(
        BertForTokenClassification(config), data, tmp_path, per_device_train_batch_size=2,
        gradient_accumulation_steps=2, train_sampling_strategy="sequential", logging_nan_inf_filter=True, **SGD,
    )  # fmt: skip
    trainer.train()
    assert not trainer.model_accepts_loss_kwargs
    logged = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert all(0.5 < loss < 1.6 for loss in logged[1:8])


# ---- Losses that are somebody's own ----


def counting(base, seen):
    class Own(base):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            seen.append(None if num_items_in_batch is None else int(num_items_in_batch))
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    return Own


@pytest.mark.parametrize("where", ["above the mixin", "below the mixin", "on the trainer"])
def test_an_overridden_loss_gets_what_plain_trainer_gives_it(where, tiny_bert, token_data, tmp_path):
    """And is scaled as there: BERT's mean by the accumulation steps too, which an override may have allowed for."""
    expected, found, data = [], [], token_data()
    flags = {**SGD, "admm_rho": 0.0, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    flags |= {"lr_scheduler_type": "constant", "max_steps": 4, "admm_steps": 4, "mask_freeze_steps": 0}
    logs = []
    for sparse in (False, True):
        seen = found if sparse else expected
        if where == "above the mixin":
            own = counting(ADMMTrainer, seen)
        elif where == "below the mixin":
            own = type("Own", (ADMMTrainerMixin, counting(Trainer, seen)), {})
        else:
            own = ADMMTrainer
        trainer = prepare(tiny_bert(), data, tmp_path, own, **flags, sparsity_pattern="2:4" if sparse else "none")
        if where == "on the trainer":
            inner = trainer.compute_loss

            def replaced(model, inputs, return_outputs=False, num_items_in_batch=None, seen=seen, inner=inner):
                seen.append(int(num_items_in_batch))
                return inner(model, inputs, return_outputs, num_items_in_batch)

            trainer.compute_loss = replaced
        trainer.train()
        logs.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert found == expected == [8] * 16 and logs[0] == logs[1]


def test_an_overridden_step_gets_the_count_too(tiny_bert, token_data, tmp_path):
    """And the loss of Trainer's own step within it is averaged."""
    seen = []

    class Steps(ADMMTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            seen.append(int(num_items_in_batch))
            return super().training_step(model, inputs, num_items_in_batch)

    model = tiny_bert(**NO_DROPOUT["tiny_bert"])
    weights_of, logs, trainer = runs_of(model, token_data(), tmp_path, Steps)
    assert_independent_of_the_split(weights_of, logs)
    assert seen == [8] * 5 * STEPS and not trainer.model_accepts_loss_kwargs


@pytest.mark.parametrize("scaled", [True, False])
def test_what_the_user_says_of_the_scale_stands(scaled, tiny_bert, token_data, tmp_path):
    logs = []
    for pattern in ("none", "2:4"):
        trainer = prepare(
            tiny_bert(**NO_DROPOUT["tiny_bert"]), token_data(), tmp_path, sparsity_pattern=pattern,
            per_device_train_batch_size=2, gradient_accumulation_steps=4, max_steps=1, admm_steps=1,
            mask_freeze_steps=0,
        )  # fmt: skip
        trainer.loss_is_scaled_for_ga = scaled
        trainer.train()
        logs.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert logs[0] == pytest.approx(logs[1]) and (logs[0][0] > 2) == scaled


# ---- The measuring itself ----


class Restless(Hands):
    """What a forward pass can leave behind: statistics, counters, draws from every generator."""

    def __init__(self, inner):
        super().__init__(inner)
        self.norm, self.calls, self.heat = nn.BatchNorm1d(8), 0, 1.0
        self.register_buffer("average", torch.zeros(1))

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        self.calls, self.heat = self.calls + 1, self.heat * 0.9
        self.average = self.average + 1
        labels[labels == 63] = -100  # in place
        self.norm(torch.rand(4, 8) + random.random() + np.random.rand())
        loss, *_ = super().forward(input_ids, attention_mask, labels, return_dict=False, **kwargs)
        return (loss * (1 + 0.1 * torch.rand(1).item() + 0.1 * random.random() * self.heat),)


def test_measuring_leaves_no_trace(tiny_gpt2, token_data, tmp_path, monkeypatch):
    """A run that measures ends with the bits of one that does not, and its model with the same statistics."""
    ends = []
    for measures in (True, False):
        if not measures:
            monkeypatch.setattr(LossScalingMixin, "_scaling_matters", lambda self: False)
        trainer = prepare(
            Restless(tiny_gpt2()), token_data(labels=None), tmp_path, per_device_train_batch_size=4,
            gradient_accumulation_steps=2, label_names=["labels"],
        )  # fmt: skip
        random.seed(0)
        trainer.train()
        assert (trainer._settled_for is trainer.model) == measures and trainer.model.calls == 2 * STEPS
        ends.append((trainer.model.state_dict(), trainer.model.heat, random.random(), np.random.rand()))
    (one, *numbers), (other, *others) = ends
    assert numbers == others and all(torch.equal(one[name], other[name]) for name in one)


def test_a_resume_measures_the_same(tiny_bert, token_data, tmp_path):
    """With dropout, from the middle of an epoch and of both phases."""
    flags = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "save_strategy": "steps"}
    straight = train(tiny_bert(), token_data(), tmp_path / "straight", save_steps=3, **flags)
    for step in (3, 9):
        resumed = prepare(tiny_bert(seed=1), token_data(), tmp_path / "resumed", save_steps=30, **flags)
        resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / f"checkpoint-{step}"))
        assert all(torch.equal(resumed.model.get_parameter(n), w) for n, w in weights(straight.model).items())


class Calls(Means):
    calls = 0

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        Calls.calls += 1
        return super().forward(input_ids, attention_mask, labels, **kwargs)


@pytest.mark.parametrize(
    ("flags", "extra"),
    [
        ({}, 0),
        ({"gradient_accumulation_steps": 2}, 2),
        ({"sparsity_pattern": "none", "gradient_accumulation_steps": 2}, 0),
    ],
)
def test_it_is_measured_once_and_only_where_it_matters(flags, extra, tiny_bert, token_data, tmp_path):
    Calls.calls = 0
    train(Calls(tiny_bert()), token_data(), tmp_path, **flags)
    assert Calls.calls == STEPS * flags.get("gradient_accumulation_steps", 1) + extra


def test_each_model_is_measured_anew(tiny_bert, tiny_gpt2, token_data, tmp_path):
    """As in a search over models; and an evaluation before the training asks too."""
    models = [Means(tiny_gpt2()), Hands(tiny_gpt2()), Means(tiny_gpt2())]
    trainer = prepare(
        None, token_data(labels=None), tmp_path, parts={"model_init": lambda: models[0]}, label_names=["labels"],
        gradient_accumulation_steps=2,
    )  # fmt: skip
    answers = []
    for _ in range(3):
        trainer.train()
        answers.append(trainer.model_accepts_loss_kwargs)
        models.pop(0)
    assert answers == [False, True, False]


class Refuses(Means):
    """A forward pass that can't be made without a gradient."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        if not torch.is_grad_enabled():
            raise RuntimeError("no gradient here")
        return super().forward(input_ids, attention_mask, labels, **kwargs)


def test_what_can_not_be_measured_is_left_to_trainer_and_said(tiny_bert, token_data, tmp_path, caplog):
    trainer = train(
        Refuses(tiny_bert()), token_data(), tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2
    )
    assert trainer.model_accepts_loss_kwargs and trainer.audit.ok
    assert caplog.text.count("could not be measured (RuntimeError: no gradient here)") == 1


def test_memory_errors_are_left_to_the_search_for_a_batch_size(tiny_bert, token_data, tmp_path):
    class Full(Means):
        calls = 0

        def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
            Full.calls += 1
            if Full.calls == 1:
                raise RuntimeError("CUDA out of memory.")
            return super().forward(input_ids, attention_mask, labels, **kwargs)

    trainer = train(
        Full(tiny_bert()), token_data(), tmp_path, gradient_accumulation_steps=2, auto_find_batch_size=True,
        logging_steps=1,
    )  # fmt: skip
    assert not trainer.model_accepts_loss_kwargs and trainer._train_batch_size < 8
    assert all(log["loss"] < 1.2 for log in trainer.state.log_history if "loss" in log)

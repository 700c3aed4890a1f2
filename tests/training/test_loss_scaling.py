"""A loss that is a plain mean is averaged over a step; every other is scaled exactly as by plain Trainer."""

import copy

import pytest
import torch
from transformers import BertConfig, BertForTokenClassification, GPT2Config, GPT2ForSequenceClassification, Trainer

from hf_admm import ADMMTrainer, ADMMTrainerMixin
from own_losses import Divides, DividesInTraining, Hands, Means, MeansInTraining
from tiny_models import NO_DROPOUT
from tiny_runs import STEPS, Recorder, prepare, train, weights


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
    if not hasattr(Trainer, "loss_is_scaled_for_ga") and not scaled:
        pytest.skip("this version of Trainer knows no such word")
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

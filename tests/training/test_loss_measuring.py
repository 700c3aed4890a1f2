"""How it is found out whether a loss is a plain mean: once, where it matters, and without a trace."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from hf_admm import ADMMTrainer
from hf_admm.training.loss_scaling import LossScalingMixin
from own_losses import Hands, Means
from tiny_runs import STEPS, prepare, train, weights


class Restless(Hands):
    """What a forward pass can leave behind: statistics, counters, draws from every generator."""

    def __init__(self, inner):
        super().__init__(inner)
        self.norm, self.calls, self.heat = nn.BatchNorm1d(8), 0, 1.0
        self.register_buffer("average", torch.zeros(1))
        self.codebook, self.history, self.counts = nn.Parameter(torch.zeros(4), requires_grad=False), [], {}
        self.moving, self.longest = torch.zeros(1), None

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        self.first = getattr(self, "first", 0) + 1  # not there before
        self.history.append(float(input_ids.sum()))
        self.counts["calls"] = self.counts.get("calls", 0) + 1
        self.moving += 1
        self.longest = torch.ones(1) + (0 if self.longest is None else self.longest)
        self.codebook.data.add_(0.1)
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
        model = trainer.model
        tensors = {**model.state_dict(), "moving": model.moving, "longest": model.longest}
        ends.append((tensors, model.heat, model.first, model.history, model.counts, random.random(), np.random.rand()))
    (one, *numbers), (other, *others) = ends
    assert numbers == others and all(torch.equal(one[name], other[name]) for name in one)


class Counting(ADMMTrainer):
    """Prepares its batches by their number."""

    prepared = 0

    def _prepare_inputs(self, inputs):
        self.prepared += 1
        return super()._prepare_inputs(inputs)


def test_measuring_leaves_no_trace_in_the_trainer(tiny_bert, token_data, tmp_path):
    trainer = train(tiny_bert(), token_data(), tmp_path, Counting, gradient_accumulation_steps=2)
    assert trainer._averages_loss and trainer.prepared == 2 * STEPS


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

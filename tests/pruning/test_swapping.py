"""Optimizers that swap weights for evaluation: what is looked at is sparse, and looking changes nothing."""

import pytest
import torch

from hf_admm import ADMMTrainer, audit_checkpoint
from tiny_models import NO_DROPOUT
from tiny_runs import assert_same_weights, prepare, weights


class Averaging(torch.optim.SGD):
    """SGD whose `eval` mixes a running average into the weights, and whose `train` takes it out again, rounded."""

    def __init__(self, params, lr=0.05):
        super().__init__(params, lr=lr)
        for group in self.param_groups:
            group["train_mode"] = True

    @torch.no_grad()
    def step(self, closure=None):
        assert all(group["train_mode"] for group in self.param_groups)
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                average = self.state[p].setdefault("average", p.clone())
                average.lerp_(p, 0.3)

    def train(self):
        self._swap(True)

    def eval(self):
        self._swap(False)

    @torch.no_grad()
    def _swap(self, mode):
        for group in self.param_groups:
            if group["train_mode"] != mode:
                for p in group["params"]:
                    if "average" in self.state[p]:
                        sign = -1 if mode else 1
                        p.add_(0.5 * sign * (self.state[p]["average"] - (p if not mode else 0.0)))
                group["train_mode"] = mode


class Forwarding:
    """A wrapper that hands everything on."""

    def __init__(self, optimizer):
        self.__dict__["inner"] = optimizer

    def __getattr__(self, name):
        return getattr(self.inner, name)


def schedule_free(parameters):
    return pytest.importorskip("schedulefree").AdamWScheduleFree(parameters, lr=3e-3)


OPTIMIZERS = {"averaging": Averaging, "schedulefree": schedule_free}


class Watched(ADMMTrainer):
    """Notes whether evaluations see sparse weights, and which."""

    saw = ()

    def prediction_step(self, model, *args, **kwargs):
        groups = [model.get_parameter(name).detach().view(-1, 4) for name in self.sparsity.targets]
        sparse = all(((group != 0).sum(dim=1) <= 2).all() for group in groups)
        self.saw = (*self.saw, sparse)
        return super().prediction_step(model, *args, **kwargs)


def make(optimizer, model, data, folder, **flags):
    constant = torch.optim.lr_scheduler.LambdaLR(torch.optim.SGD([torch.zeros(1)], 0.1), lambda step: 1.0)
    parts = {"optimizers": (OPTIMIZERS[optimizer](model.parameters()), constant)}
    return prepare(model, data, folder, Watched, parts=parts, **flags)


@pytest.mark.parametrize("penalty", ["loss", "decoupled"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_evaluating_and_saving_changes_no_bit(optimizer, penalty, tiny_bert, token_data, tmp_path):
    data, flags = token_data(), {"admm_penalty": penalty}
    quiet = make(optimizer, tiny_bert(**NO_DROPOUT["tiny_bert"]), data, tmp_path / "quiet", **flags)
    quiet.train()
    flags |= {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 3}
    watched = make(optimizer, tiny_bert(**NO_DROPOUT["tiny_bert"]), data, tmp_path / "watched", **flags)
    watched.train()
    assert watched.saw and all(watched.saw) and watched.audit.ok
    assert_same_weights(watched.model, weights(quiet.model))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_what_is_evaluated_is_what_is_saved(optimizer, tiny_bert, token_data, tmp_path):
    flags = {"eval_strategy": "steps", "eval_steps": 4, "save_strategy": "steps", "save_steps": 4}
    data = token_data()
    trainer = make(optimizer, tiny_bert(), data, tmp_path / "run", save_total_limit=9, **flags)
    trainer.train()
    losses = {log["step"]: log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log}
    for step in (4, 8, 12):
        folder = tmp_path / "run" / f"checkpoint-{step}"
        assert audit_checkpoint(folder).ok
        loaded = type(trainer.model).from_pretrained(folder)
        plain = prepare(loaded, data, tmp_path / "plain", sparsity_pattern="none")
        assert plain.evaluate()["eval_loss"] == losses[step]
    assert trainer.evaluate()["eval_loss"] == losses[12]


@pytest.mark.parametrize("steps", [0, 6])
def test_an_average_that_knows_nothing_of_what_is_pruned_at_the_switch(steps, tiny_bert, token_data, tmp_path, caplog):
    flags = {"num_calibration_samples": 8, "admm_steps": steps, "admm_rho": 0.0, "admm_update_steps": None}
    assert make("averaging", tiny_bert(), token_data(), tmp_path, **flags).train().global_step == 12
    said = (
        "Prune it before the first step (admm_steps=0, num_calibration_samples=8), or take an optimizer that does not"
    )
    assert caplog.text.count(said) == bool(steps)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("step", [3, 6, 9])
def test_a_resume_ends_with_the_same_bits(step, optimizer, tiny_bert, token_data, tmp_path):
    data, flags = token_data(), {"save_strategy": "steps", "save_steps": 3, "save_total_limit": 9}
    straight = make(optimizer, tiny_bert(), data, tmp_path / "straight", **flags)
    straight.train()
    resumed = make(optimizer, tiny_bert(seed=1), data, tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / f"checkpoint-{step}"))
    assert_same_weights(resumed.model, weights(straight.model))


def test_a_wrapper_is_seen_through(tiny_bert, token_data, tmp_path):
    from hf_admm.pruning.swapping import SwappedParameters

    model = tiny_bert()
    assert SwappedParameters(Forwarding(Averaging(model.parameters())))
    assert not SwappedParameters(torch.optim.AdamW(model.parameters())) and not SwappedParameters(None)

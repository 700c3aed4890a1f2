"""Each phase step by step against its textbook form, and what moves between them."""

import copy

import pytest
import torch

from hf_admm import ADMMTrainer
from hf_admm.sparsity.projections import project, sparsity_mask
from tiny_models import NO_DROPOUT
from tiny_runs import Recorder, train, weights


def test_phase_1_follows_admm_step_by_step(tiny_bert, token_data, tmp_path):
    """Z and U, kept apart as in the textbook, give the anchors of the run at every update."""
    take = Recorder("on_step_end", lambda state, model=None, **_: (state.global_step, weights(model)))
    anchors = {}

    class Spy(ADMMTrainer):
        def training_step(self, *args, **kwargs):
            if self.sparsity.phase.name == "admm":
                anchors[self.state.global_step] = {n: a.clone() for n, a in self.sparsity.phase.companions.items()}
            return super().training_step(*args, **kwargs)

    model = tiny_bert()
    start = weights(model)
    trainer = train(model, token_data(), tmp_path, Spy, callbacks=[take])
    by_step = {0: start, **dict(take.seen)}
    name = next(iter(trainer.sparsity.targets))
    z = project(start[name], trainer.args.pattern)
    u = torch.zeros_like(z)
    assert sorted(anchors) == list(range(6))
    for step in range(6):
        if step and step % 2 == 0:
            v = by_step[step][name] + u
            z = v * sparsity_mask(v, trainer.args.pattern)
            u = v - z
        torch.testing.assert_close(anchors[step][name], z - u, rtol=1e-5, atol=1e-7)


def test_phase_2_is_the_straight_through_estimator(tiny_bert, token_data, tmp_path):
    """SGD by hand on a copy, with the mask as a function of the dense weight in an autograd graph."""
    data, model = token_data(8), tiny_bert(**NO_DROPOUT["tiny_bert"])
    reference, rate, decay = copy.deepcopy(model), 0.1, 0.3
    trainer = train(
        model, data, tmp_path, max_steps=3, admm_steps=0, srste_decay=decay, mask_freeze_steps=0, optim="sgd",
        learning_rate=rate, lr_scheduler_type="constant", max_grad_norm=0.0,
    )  # fmt: skip
    batch = {key: torch.stack([torch.as_tensor(row[key]) for row in data]) for key in data[0]}
    pattern, targets = trainer.args.pattern, trainer.sparsity.targets
    dense = weights(reference)
    for _ in range(3):
        masks = {name: sparsity_mask(dense[name], pattern) for name in targets}
        values = {n: w * masks[n] if n in masks else w for n, w in dense.items()}
        leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
        torch.func.functional_call(reference, leaves, kwargs=batch).loss.backward()
        for name, weight in dense.items():
            gradient = leaves[name].grad
            if name in masks:
                gradient = gradient + decay * ~masks[name] * weight
            weight -= rate * gradient
    for name, weight in dense.items():
        expected = weight * masks[name] if name in masks else weight
        torch.testing.assert_close(model.get_parameter(name), expected, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("flags", [{"srste_mask": "fixed"}, {"mask_freeze_steps": 6}])
def test_a_frozen_mask_stays(flags, tiny_bert, token_data, tmp_path):
    masks = []

    class Spy(ADMMTrainer):
        def training_step(self, *args, **kwargs):
            phase = self.sparsity.phase
            names = phase.companions if phase.name == "srste" else ()
            masks.append({name: phase.mask(name) for name in names})
            return super().training_step(*args, **kwargs)

    trainer = train(tiny_bert(), token_data(), tmp_path, Spy, learning_rate=0.05, **flags)
    frozen = masks[6:]
    for name, weight in trainer.sparsity.weights.parameters.items():
        assert all(torch.equal(mask[name], frozen[0][name]) for mask in frozen)
        assert torch.equal((weight != 0) & ~frozen[0][name], torch.zeros_like(frozen[0][name]))


def test_a_dynamic_mask_follows_every_few_steps(tiny_bert, token_data, tmp_path):
    masks = []

    class Spy(ADMMTrainer):
        def training_step(self, *args, **kwargs):
            phase = self.sparsity.phase
            names = phase.companions if phase.name == "srste" else ()
            masks.append({name: phase.mask(name) for name in names})
            return super().training_step(*args, **kwargs)

    train(tiny_bert(), token_data(), tmp_path, Spy, learning_rate=0.05, admm_steps=0, mask_update_steps=3,
          mask_freeze_steps=4)  # fmt: skip
    moved = [any(not torch.equal(a[name], b[name]) for name in a) for a, b in zip(masks[:-1], masks[1:], strict=True)]
    assert [step + 1 for step, flag in enumerate(moved) if flag] == [3, 6]  # 9 and later are frozen: 12 - 4 = 8


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant_with_warmup"])
def test_the_learning_rate_has_a_segment_for_each_phase(kind, tiny_bert, token_data, tmp_path):
    take = Recorder("on_step_begin", lambda state, optimizer=None, **_: optimizer.param_groups[0]["lr"])
    train(
        tiny_bert(), token_data(), tmp_path, callbacks=[take], max_steps=20, admm_steps=0.6, lr_scheduler_type=kind,
        warmup_steps=5, srste_lr_multiplier=2.0,
    )  # fmt: skip
    rates = take.seen
    assert rates[0] == 0.0 and rates[3] == max(rates[:12]) == 1e-3  # 3 of the 5 steps of warm-up
    assert rates[12] == 0.0 and rates[14] == max(rates[12:]) == 2e-3  # the other 2, to a peak of its own
    if kind != "constant_with_warmup":
        assert rates[11] < 2e-4 and rates[19] < 5e-4 and rates[15] < rates[14]


def test_phase_1_may_hold_the_learning_rate(tiny_bert, token_data, tmp_path):
    take = Recorder("on_step_begin", lambda state, optimizer=None, **_: optimizer.param_groups[0]["lr"])
    train(
        tiny_bert(), token_data(), tmp_path, callbacks=[take], max_steps=20, admm_steps=12,
        admm_lr_scheduler_type="constant_with_warmup", warmup_steps=5,
    )  # fmt: skip
    assert take.seen[3:12] == [1e-3] * 9 and take.seen[14] == 1e-3 and take.seen[19] < 3e-4


@pytest.mark.parametrize("admm_steps", [0, 20])
def test_the_only_phase_has_the_peak_of_that_phase(admm_steps, tiny_bert, token_data, tmp_path):
    take = Recorder("on_step_begin", lambda state, optimizer=None, **_: optimizer.param_groups[0]["lr"])
    train(
        tiny_bert(), token_data(), tmp_path, callbacks=[take], max_steps=20, admm_steps=admm_steps,
        mask_freeze_steps=0, srste_lr_multiplier=3.0,
    )  # fmt: skip
    assert max(take.seen) == take.seen[0] == pytest.approx(1e-3 if admm_steps else 3e-3)


def test_a_phase_1_without_any_update_is_not_silent(tiny_bert, token_data, tmp_path, caplog):
    train(tiny_bert(), token_data(), tmp_path, admm_update_steps=6)
    assert "Z and U are updated every 6: never" in caplog.text

"""Phase 1 with the squared distance to the pattern: step by step against its formulas, and how far it comes."""

import math

import pytest
import torch

from hf_admm import ADMMTrainingArguments, parse_pattern, sparsity_mask
from hf_admm.pruning.schedules import PhasePlan
from hf_admm.pruning.updates import shrink_outside
from tiny_runs import Recorder, assert_same_weights, prepare, train, weights


# The defaults, but for a run of a few steps.
OURS = {"admm_rho": None, "admm_update_steps": None, "max_steps": 48, "admm_steps": 24}


def test_shrinking_is_the_minimiser_of_its_problem():
    weight = torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask, share = sparsity_mask(weight, parse_pattern("2:4")), 0.3
    free = weight.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([free], max_iter=100, tolerance_grad=1e-12, tolerance_change=1e-14)

    def objective():
        optimizer.zero_grad()
        value = share / 2 * (free * ~mask).square().sum() + 0.5 * (free - weight).square().sum()
        value.backward()
        return value

    optimizer.step(objective)
    moved = weight.clone()
    shrink_outside(moved, mask, share)
    torch.testing.assert_close(moved, free.detach(), rtol=1e-9, atol=1e-12)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):  # not one bit of what is kept
        for share in (1e-9, 0.0123, 0.3, 7.7):
            moved = weight.to(dtype)
            shrink_outside(moved, mask, share)
            assert torch.equal(moved[mask], weight.to(dtype)[mask])
    at_once, one_by_one = weight.clone(), weight.clone()
    shrink_outside(at_once, mask, 0.3, 5)
    for _ in range(5):
        shrink_outside(one_by_one, mask, 0.3)
    torch.testing.assert_close(at_once, one_by_one, rtol=1e-12, atol=0)
    shrink_outside(at_once, mask, 7.7, 2**62)
    assert torch.equal(at_once, weight * mask), "without an overflow"


@pytest.mark.parametrize("steps", [1, 2, 24, 301])
def test_the_shares_add_up_whatever_the_length(steps):
    plan = PhasePlan(2 * steps, steps, 2 * steps)
    shares = [plan.shrinkage(16.0, step) for step in range(steps)]
    assert all(b >= a for a, b in zip(shares[:-1], shares[1:], strict=True))
    if steps > 20:
        assert sum(shares) == pytest.approx(16.0, rel=0.1)
    assert shares[-1] == pytest.approx(16.0 / steps * 10 / 3)


def test_the_share_waits_rises_as_a_cosine_and_stays():
    plan = PhasePlan(200, 100, 200)
    shares = [plan.shrinkage(15.0, step) for step in range(100)]
    assert shares[:60] == [0.0] * 60 and 0 < shares[60] < shares[61]
    assert shares[69] == pytest.approx(0.25) and shares[79] == pytest.approx(0.5)
    assert shares[79:] == [shares[79]] * 21 and shares[78] < shares[79]
    assert [plan.stage_progress(step) for step in (0, 60, 70, 80, 99)] == pytest.approx([0, 0, 0.5, 1, 1])


@pytest.mark.parametrize(
    ("pattern", "stages"),
    [
        ("2:4", ["2:4"] * 4), ("4:8", ["4:8"] * 4), ("1:4", ["3:4", "3:4", "2:4", "1:4"]),
        ("2:8", ["6:8", "6:8", "4:8", "2:8"]), ("4x4:4", ["4x4:12", "4x4:12", "4x4:8", "4x4:4"]), ("0.5", ["0.5"] * 4),
    ],
)  # fmt: skip
def test_few_are_kept_by_way_of_more(pattern, stages):
    assert [str(parse_pattern(pattern).stage(progress)) for progress in (0, 0.3, 0.5, 1)] == stages
    shares = [parse_pattern("0.25").stage(progress).density for progress in (0, 0.4, 1)]
    assert shares == pytest.approx([0.75, 0.5, 0.25])


def test_phase_1_follows_its_formulas(tiny_bert, token_data, tmp_path):
    """From where the optimizer has left W, which is what the step would leave without a penalty."""
    moved = Recorder("on_optimizer_step", lambda state, model=None, **_: None)
    after = Recorder("on_step_end", lambda state, model=None, **_: weights(model))
    trainer = prepare(tiny_bert(), token_data(), tmp_path, callbacks=[after], **{**OURS, "sparsity_pattern": "1:4"})
    # Ahead of our own callbacks.
    moved.on_optimizer_step = lambda args, state, control, model=None, **_: moved.seen.append(weights(model))
    trainer.callback_handler.callbacks.insert(1, moved)
    trainer.train()
    plan, name = trainer.args.phase_plan(48), next(iter(trainer.sparsity.targets))
    mask = sparsity_mask(tiny_bert().get_parameter(name).detach(), parse_pattern("3:4"))
    for step in range(24):
        if step:
            stage = parse_pattern("1:4").stage(plan.stage_progress(step))
            mask = sparsity_mask(after.seen[step - 1][name], stage)
        share = plan.shrinkage(16.0, step)
        expected = torch.where(mask, moved.seen[step][name], moved.seen[step][name] / (1 + share))
        torch.testing.assert_close(after.seen[step][name], expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("decay", "interval"), [(None, None), (None, 5), (0.1, None)])
def test_phase_2_goes_on_with_the_last_share(decay, interval, tiny_bert, token_data, tmp_path):
    """The share of each step, at the updates of the mask; unless a decay was asked for, which is in the gradient."""
    name, mask = "bert.encoder.layer.0.attention.self.query.weight", lambda: trainer.sparsity.phase.mask(name)
    ended = Recorder("on_step_end", lambda state, model=None, **_: (weights(model)[name], mask()))
    begun = Recorder(
        "on_step_begin", lambda state, **_: trainer.sparsity.weights.aside.get(name, torch.zeros(0)).clone()
    )
    flags = {**OURS, "srste_decay": decay, "mask_update_steps": interval}
    trainer = prepare(tiny_bert(), token_data(), tmp_path, callbacks=[ended, begun], **flags)
    trainer.train()
    plan, interval = trainer.args.phase_plan(48), interval or 1  # 1 in phase 1 too, which has 24 steps
    share = plan.shrinkage(16.0, 23) if decay is None else 0.0
    assert share > 0.5 or decay
    for step in range(24, 48):
        before, mask_before = ended.seen[step - 1]
        due = step > 24 and (step - 24) % interval == 0 and step <= plan.freeze_step
        factor = (1 + share) ** -interval if due else 1.0
        expected = torch.where(mask_before, before, before * factor)
        torch.testing.assert_close(begun.seen[step], expected, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize(
    ("flags", "interval"),
    [
        ({"num_calibration_samples": 0}, 20), ({"admm_update_steps": 7}, 7), ({"mask_update_steps": 3}, 3),
        ({"srste_decay": 2e-4}, 1),
        ({"admm_penalty": "loss"}, 1), ({"admm_rho": 0.0, "admm_penalty": "distance"}, 1), ({"admm_steps": 0}, 1),
    ],
)  # fmt: skip
def test_the_mask_of_phase_2_follows_as_often_as_in_phase_1(flags, interval, tmp_path):
    args = ADMMTrainingArguments(str(tmp_path), use_cpu=True, **flags)
    assert args.phase_settings(800).mask_update_steps == interval


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4", "4x4:4", "0.5"])
@pytest.mark.parametrize("learning_rate", [1e-4, 3e-4])
def test_phase_1_converges_with_the_defaults(pattern, learning_rate, tiny_bert, token_data, tmp_path, caplog):
    flags = {**OURS, "max_steps": 120, "admm_steps": 0.5, "sparsity_pattern": pattern, "learning_rate": learning_rate}
    trainer = train(tiny_bert(), token_data(), tmp_path, **flags)
    logs = [log for log in trainer.state.log_history if log.get("admm/phase") == 1]
    at_switch = next(log["admm/switch_residual"] for log in trainer.state.log_history if "admm/switch_residual" in log)
    assert at_switch <= 0.05 < logs[10]["admm/primal_residual"]
    assert all(log["admm/mask_flips"] <= 0.01 for log in logs[40:])
    assert "has not converged" not in caplog.text and trainer.audit.ok


def test_what_does_not_converge_is_told(tiny_bert, token_data, tmp_path, caplog):
    train(tiny_bert(), token_data(), tmp_path, admm_rho=1e-4)
    assert (
        "of the norm of the pruned weights is cut off: phase 1 has not converged (at most 5% is good)" in caplog.text
    )


def test_the_switch_changes_nothing_that_is_evaluated(tiny_bert, token_data, tmp_path):
    """Evaluated before the switch and, with the mask of phase 2, after it."""
    losses = []
    trainer = prepare(tiny_bert(), token_data(), tmp_path, **OURS)
    end = Recorder("on_step_end", lambda state, **_: None)

    def look(args, state, control, **kwargs):
        if state.global_step == 24:
            losses.append(trainer.evaluate()["eval_loss"])
            settings = args.phase_settings(state.max_steps)
            before = trainer.sparsity.phase.rho
            trainer.sparsity.before_forward(24, settings)
            assert trainer.sparsity.phase.name == "srste" and trainer.sparsity.phase.rho == before > 0
            trainer.sparsity.restore_dense()
            losses.append(trainer.evaluate()["eval_loss"])

    end.on_step_end = look
    trainer.add_callback(end)
    trainer.train()
    assert len(losses) == 2 and losses[0] == losses[1] and math.isfinite(losses[0])


@pytest.mark.parametrize("step", [6, 18, 24, 36])
@pytest.mark.parametrize("pattern", ["2:4", "1:4"])
def test_a_resume_ends_with_the_same_bits(step, pattern, tiny_bert, token_data, tmp_path):
    data, flags = token_data(), {**OURS, "sparsity_pattern": pattern, "save_strategy": "steps", "save_steps": 6}
    straight = train(tiny_bert(), data, tmp_path / "straight", **flags)
    resumed = prepare(tiny_bert(seed=1), data, tmp_path / "resumed", **flags)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / f"checkpoint-{step}"))
    assert_same_weights(resumed.model, weights(straight.model))


def test_a_given_rho_is_that_of_admm(tiny_bert, token_data, tmp_path):
    args = prepare(tiny_bert(), token_data(), tmp_path, admm_rho=0.5).args
    settings = args.phase_settings(100)
    assert (settings.penalty, settings.rho, settings.update_steps, settings.decay) == ("loss", 0.5, 2, 2e-4)
    args = prepare(tiny_bert(), token_data(), tmp_path, **{**OURS, "admm_steps": 0.6}).args
    settings = args.phase_settings(1000)
    assert (settings.penalty, settings.rho, settings.update_steps, settings.decay) == ("distance", 16.0, 25, None)
    args = prepare(tiny_bert(), token_data(), tmp_path, **{**OURS, "admm_steps": 0}).args
    assert args.phase_settings(1000).decay == 2e-4

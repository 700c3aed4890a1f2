"""The arithmetic of a run: phases, rho, and the learning rate of both phases."""

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from hf_admm.arguments import ADMMTrainingArguments
from hf_admm.pruning.schedules import RHO_SCHEDULES, PhasePlan, join_segments, to_steps


@pytest.fixture
def plan(tmp_path):
    """The plan of a run of 100 steps."""

    def build(max_steps=100, **flags):
        return ADMMTrainingArguments(str(tmp_path), use_cpu=True, report_to="none", **flags).phase_plan(max_steps)

    return build


# ---- Phases ----


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, PhasePlan(100, 0, 0)),  # pruned before training
        ({"num_calibration_samples": 0}, PhasePlan(100, 60, 90)),
        ({"admm_steps": 0.25, "mask_freeze_steps": 0.5}, PhasePlan(100, 25, 50)),
        ({"admm_steps": 70, "mask_freeze_steps": 5}, PhasePlan(100, 70, 95)),
        ({"admm_steps": 0}, PhasePlan(100, 0, 90)),  # plain SR-STE
        ({"admm_steps": 100}, PhasePlan(100, 100, 100)),  # ADMM alone
        ({"admm_steps": 0.6, "mask_freeze_steps": 0}, PhasePlan(100, 60, 100)),  # never frozen
        ({"admm_steps": 0.8, "mask_freeze_steps": 0.5}, PhasePlan(100, 80, 80)),  # not before there is a mask
        ({"srste_mask": "fixed"}, PhasePlan(100, 0, 0)),
        ({"srste_decay": 2e-4}, PhasePlan(100, 0, 90)),  # pruned before training, by a mask that moves on
        ({"srste_mask": "fixed", "admm_steps": 0.6}, PhasePlan(100, 60, 60)),
        ({"srste_mask": "fixed", "admm_steps": 0}, PhasePlan(100, 0, 0)),  # one-shot pruning
        ({"admm_steps": 1}, PhasePlan(100, 1, 90)),  # 1 is a step, as in warmup_steps, and not the whole run
    ],
)
def test_phase_plan(flags, expected, plan):
    assert plan(**flags) == expected


@pytest.mark.parametrize(
    ("given", "segments"), [((100, 60, 90), [60, 40]), ((100, 0, 90), [100]), ((100, 100, 100), [100])]
)
def test_only_phases_that_exist_have_a_segment(given, segments):
    assert PhasePlan(*given).segments == segments


@pytest.mark.parametrize("max_steps", [1, 2, 3, 7, 99, 1001])
@pytest.mark.parametrize("flags", [{}, {"admm_steps": 0.5, "mask_freeze_steps": 0.5}, {"srste_mask": "fixed"}])
def test_the_phases_make_up_the_run_whatever_its_length(max_steps, flags, plan):
    built = plan(max_steps, **flags)
    assert sum(built.segments) == max_steps
    assert 0 <= built.admm_steps <= built.freeze_step <= max_steps


@pytest.mark.parametrize(
    ("value", "max_steps", "steps"),
    [(0, 10, 0), (0.0, 10, 0), (0.6, 10, 6), (0.29, 100, 29), (0.999, 10, 10), (1, 10, 1), (10.0, 10, 10)],
)
def test_to_steps(value, max_steps, steps):
    # 0.29 * 100 is 28.999999999999996: rounded, not cut.
    result = to_steps("admm_steps", value, max_steps)
    assert result == steps and type(result) is int


@pytest.mark.parametrize("value", [11, 11.0, 1000])
def test_more_steps_than_the_run_has(value):
    with pytest.raises(ValueError, match=rf"admm_steps={value:g} is beyond the run, which has 10 .*at most 10 steps"):
        to_steps("admm_steps", value, 10)


# ---- rho ----


@pytest.mark.parametrize("schedule", RHO_SCHEDULES)
@pytest.mark.parametrize("admm_steps", [1, 2, 16, 1000])
def test_rho_grows_to_its_value_over_phase_1(schedule, admm_steps):
    built = PhasePlan(2 * admm_steps, admm_steps, 2 * admm_steps)
    rhos = [built.rho(0.01, schedule, step) for step in range(admm_steps)]
    # U is the dual variable over rho: rho must not be 0. The support of Z is read off T: rho must not shrink.
    assert all(rho > 0 for rho in rhos)
    assert rhos == sorted(rhos)
    assert rhos[-1] == 0.01


@pytest.mark.parametrize("schedule", RHO_SCHEDULES)
def test_rho_stays_after_phase_1(schedule):
    built = PhasePlan(20, 10, 20)
    assert [built.rho(0.5, schedule, step) for step in (9, 10, 15, 100)] == [0.5] * 4
    assert PhasePlan(20, 0, 20).rho(0.5, schedule, 0) == 0.5  # and there may be none


@pytest.mark.parametrize(
    ("schedule", "halfway"), [("constant", 1.0), ("linear", 0.5), ("cosine", 0.5), ("exponential", 0.1)]
)
def test_rho_halfway(schedule, halfway):
    # `exponential` spans two decades, so halfway it is one below its end.
    assert PhasePlan(20, 10, 20).rho(2.0, schedule, 4) == pytest.approx(2.0 * halfway)


@pytest.mark.parametrize("schedule", RHO_SCHEDULES)
def test_no_penalty_is_no_penalty_at_any_time(schedule):
    assert {PhasePlan(20, 10, 20).rho(0.0, schedule, step) for step in range(20)} == {0.0}


# ---- Learning rate ----


def optimizer():
    return torch.optim.SGD([{"params": [torch.zeros(1)], "lr": rate} for rate in (1e-3, 3e-4)])


def rates(scheduler, steps):
    """The learning rates of each step, as Trainer meets them."""
    seen = []
    for _ in range(steps):
        seen.append([group["lr"] for group in scheduler.optimizer.param_groups])
        scheduler.optimizer.step()
        scheduler.step()
    return seen


def one(name, steps, warmup):
    return get_scheduler(name, optimizer(), num_warmup_steps=warmup, num_training_steps=steps)


@pytest.mark.parametrize("name", ["linear", "cosine", "polynomial", "constant_with_warmup", "inverse_sqrt"])
@pytest.mark.parametrize("lengths", [[6, 4], [1, 9], [9, 1], [5, 3, 2]])
def test_joined_segments_equal_independent_schedules(name, lengths):
    warmups = [2, *[0] * (len(lengths) - 1)]
    expected = []
    for length, warmup in zip(lengths, warmups, strict=True):
        expected += rates(one(name, length, warmup), length)
    parts = [one(name, length, warmup) for length, warmup in zip(lengths, warmups, strict=True)]
    peaks = [1.0] * len(lengths)
    joined = LambdaLR(optimizer(), join_segments([part.lr_lambdas[0] for part in parts], lengths, peaks))
    assert rates(joined, sum(lengths)) == expected


def test_the_last_segment_goes_on_past_its_end():
    # LambdaLR asks for one step more than are trained.
    joined = join_segments([lambda step: 1 - step / 4, lambda step: 0.5 - step / 8], [4, 4], [1, 2])
    assert [joined(step) for step in (3, 4, 8, 9)] == [0.25, 1.0, 0.0, -0.25]


def test_segments_without_steps_are_skipped():
    joined = join_segments([lambda step: 10 + step, lambda step: 20 + step], [0, 2], [1, 1])
    assert [joined(0), joined(1)] == [20, 21]


def test_the_joined_schedule_leaves_nothing_in_the_checkpoint():
    # LambdaLR saves the attributes of a callable object, which a later release could not read back.
    joined = LambdaLR(optimizer(), join_segments([lambda step: 1.0, lambda step: 0.5], [2, 2], [1, 1]))
    assert joined.state_dict()["lr_lambdas"] == [None, None]

"""Each phase has the schedule that plain Trainer would make with the optimizer in use."""

import pytest
import torch
from transformers import TrainingArguments, get_scheduler
from transformers.trainer_utils import SchedulerType

from hf_admm import ADMMTrainingArguments
from hf_admm.training.learning_rate import phase_scheduler
from tiny_runs import STEPS, Recorder, prepare, train


PEAK, OTHER = 1e-3, 3e-4  # of two groups; `learning_rate` stays at its default, 5e-5


def optimizer(peak=1.0):
    groups = [{"params": [torch.zeros(1)], "lr": rate * peak} for rate in (PEAK, OTHER)]
    return torch.optim.AdamW(groups, lr=PEAK * peak)


def rates(scheduler, steps):
    """The learning rates of each step, as Trainer meets them."""
    seen = []
    for _ in range(steps):
        seen.append([group["lr"] for group in scheduler.optimizer.param_groups])
        scheduler.optimizer.step()
        scheduler.step()
    return seen


def plain(name, kwargs, steps, warmup=0, peak=1.0):
    return rates(get_scheduler(name, optimizer(peak), warmup, steps, kwargs), steps)


@pytest.fixture
def phased(tmp_path):
    def build(name, kwargs=None, run=20, admm_steps=0.6, in_use=None, **flags):
        args = ADMMTrainingArguments(
            str(tmp_path), use_cpu=True, report_to="none", lr_scheduler_type=name, lr_scheduler_kwargs=kwargs,
            admm_steps=admm_steps, **{"admm_penalty": "loss", **flags},
        )  # fmt: skip
        return phase_scheduler(args, in_use or optimizer(), run)

    return build


def recorder():
    return Recorder("on_pre_optimizer_step", lambda state, optimizer=None, **_: optimizer.param_groups[0]["lr"])


WITHOUT_COUNTS = [
    ("linear", None),
    ("cosine", None),
    ("cosine_with_restarts", {"num_cycles": 2}),
    ("polynomial", {"lr_end": 1e-4, "power": 2.0}),
    ("constant_with_warmup", None),
    ("inverse_sqrt", None),
    ("cosine_with_min_lr", {"min_lr": 1e-4}),
    ("cosine_with_min_lr", {"min_lr_rate": 0.1}),
    ("cosine_warmup_with_min_lr", {"min_lr": 1e-4, "warmup_lr_rate": 0.2}),
]


def test_the_defaults_hold_the_rate_then_double_it(phased):
    """Unless the user has chosen a schedule: then it is that of both phases."""
    found = rates(phased("linear", admm_penalty="distance", warmup_steps=5), 20)
    held = plain("constant_with_warmup", None, 12, warmup=3)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(held + plain("linear", None, 8, 2, 2.0)))
    assert held[3:] == [[PEAK, 0.3 * PEAK]] * 9
    chosen = rates(phased("cosine", admm_penalty="distance"), 20)
    torch.testing.assert_close(
        torch.tensor(chosen), torch.tensor(plain("cosine", None, 12) + plain("cosine", None, 8, peak=2.0))
    )


@pytest.mark.parametrize(("name", "kwargs"), WITHOUT_COUNTS)
@pytest.mark.parametrize("multiplier", [1.0, 2.0])
def test_each_phase_is_plain_trainers_schedule_of_its_length_and_peak(name, kwargs, multiplier, phased):
    found = rates(phased(name, kwargs, warmup_steps=5, srste_lr_multiplier=multiplier), 20)
    expected = plain(name, kwargs, 12, warmup=3) + plain(name, kwargs, 8, warmup=2, peak=multiplier)
    if multiplier == 1.0:
        assert found == expected
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("name", "kwargs"), [("cosine_with_min_lr", {"min_lr": 1e-4}), ("polynomial", {"lr_end": 1e-4})]
)
def test_an_absolute_floor_is_that_of_both_phases(name, kwargs, phased):
    found = [group[0] for group in rates(phased(name, kwargs, run=2000, srste_lr_multiplier=4.0), 2000)]
    assert max(found[:1200]) == pytest.approx(PEAK) and max(found[1200:]) == pytest.approx(4 * PEAK)
    assert min(found[:1200]) == pytest.approx(1e-4, rel=0.05) and min(found[1200:]) == pytest.approx(1e-4, rel=0.05)
    assert min(found) >= 1e-4


@pytest.mark.parametrize(("name", "floor"), [("cosine_with_min_lr", "min_lr"), ("polynomial", "lr_end")])
def test_a_peak_below_the_floor_is_refused(name, floor, phased):
    with pytest.raises(ValueError, match=rf"srste_lr_multiplier=0.01 .* below the {floor}=0.0001 .*at least 0.1"):
        phased(name, {floor: 1e-4}, srste_lr_multiplier=0.01)


@pytest.mark.parametrize("run", [25, 50, 100])
def test_stable_and_decay_steps_hold_their_share_in_each_phase(run, phased):
    """A fifth of warm-up and two of decay, in the run as in each phase, to a step; the same with both counts."""
    warmup, decay = round(0.2 * run), round(0.4 * run)
    kwargs = {"num_decay_steps": decay, "decay_type": "linear"}
    found = rates(phased("warmup_stable_decay", kwargs, run=run, warmup_steps=warmup), run)
    both = {**kwargs, "num_stable_steps": run - warmup - decay}
    assert rates(phased("warmup_stable_decay", both, run=run, warmup_steps=warmup), run) == found
    first = round(0.6 * run)
    for begin, end in ((0, first), (first, run)):
        part = [group[0] for group in found[begin:end]]
        length = end - begin
        assert part[0] < PEAK or round(warmup / run * length) == 0
        assert abs(sum(rate == pytest.approx(PEAK) for rate in part) - (0.4 * length + 1)) <= 1.5
        falls = [(one, other) for one, other in zip(part, part[1:], strict=False) if other < one]
        assert abs(len(falls) - (0.4 * length - 1)) <= 1.5 and part[-1] < 0.6 * PEAK


def test_a_decay_of_a_fifth_of_the_run_is_the_last_fifth_of_each_phase(phased):
    found = [rate for rate, _ in rates(phased("warmup_stable_decay", {"num_decay_steps": 20}, run=100), 100)]
    assert found[:49] == [PEAK] * 49 and found[49] < PEAK and found[59] < 0.05 * PEAK  # the first step of 12 is 1
    assert found[60:93] == [PEAK] * 33 and found[93] < PEAK and found[99] < 0.05 * PEAK


def test_the_timescale_holds_its_share(phased):
    """So that each phase ends where the whole run would."""
    found, whole = (
        rates(phased("inverse_sqrt", {"timescale": 50}, run=1000), 1000),
        plain("inverse_sqrt", {"timescale": 50}, 1000),
    )
    assert found[599][0] == pytest.approx(whole[-1][0], rel=1e-2)
    assert found[-1][0] == pytest.approx(whole[-1][0], rel=1e-2)


def test_counts_that_nobody_knows_are_refused_by_name(phased):
    with pytest.raises(ValueError, match="lr_scheduler_kwargs has num_hold_steps, num_swing_steps, which seem"):
        phased("linear", {"num_hold_steps": 3, "num_swing_steps": 2})


@pytest.mark.parametrize("name", ["reduce_lr_on_plateau", "greedy"])
def test_schedules_that_follow_the_evaluations_run_through_both_phases(name, phased, caplog):
    assert phased(name, eval_strategy="steps", eval_steps=4) is None
    assert f"lr_scheduler_type={name} has no fixed length, so it runs through both phases" in caplog.text


@pytest.mark.parametrize("name", [kind.value for kind in SchedulerType])
def test_every_schedule_of_transformers_trains_with_an_optimizer_of_ones_own(name, tiny_bert, token_data, tmp_path):
    """With the rates of that optimizer, in both phases."""
    needed = {"warmup_stable_decay": {"num_decay_steps": 4}, "cosine_with_min_lr": {"min_lr": 1e-4}}
    needed["cosine_warmup_with_min_lr"] = needed["cosine_with_min_lr"]
    model, take = tiny_bert(), recorder()
    trainer = train(
        model, token_data(), tmp_path, callbacks=[take], lr_scheduler_type=name, learning_rate=5e-5,
        lr_scheduler_kwargs=needed.get(name), eval_strategy="steps", eval_steps=4,
        parts={"optimizers": (torch.optim.SGD(model.parameters(), lr=PEAK), None)},
    )  # fmt: skip
    assert trainer.audit.ok and len(take.seen) == STEPS
    if name != "greedy":  # which may climb
        assert 0.9 * PEAK < take.seen[0] <= PEAK and 0.9 * PEAK < take.seen[6] <= PEAK and max(take.seen) <= PEAK


@pytest.mark.parametrize("rate", [torch.tensor(PEAK), PEAK])
def test_the_rate_may_be_a_tensor_or_stand_in_the_groups_alone(rate, phased):
    in_use = torch.optim.SGD([torch.zeros(1)], lr=PEAK)
    in_use.param_groups[0]["lr"] = rate
    if not isinstance(rate, torch.Tensor):
        del in_use.defaults["lr"]
    scheduler = phased("cosine_with_min_lr", {"min_lr": 1e-4}, in_use=in_use)
    expected = [one for one, _ in plain("cosine_with_min_lr", {"min_lr": 1e-4}, 12)]
    found = []
    for _ in range(12):
        found.append(float(in_use.param_groups[0]["lr"]))
        in_use.step()
        scheduler.step()
    assert found == pytest.approx(expected)


def test_the_arguments_may_be_json(tiny_bert, token_data, tmp_path):
    given = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": '{"min_lr": 5e-4}'}
    assert TrainingArguments(str(tmp_path), **given).lr_scheduler_kwargs == {"min_lr": 5e-4}
    take = recorder()
    train(tiny_bert(), token_data(), tmp_path, callbacks=[take], **given)
    assert min(take.seen) >= 5e-4 and max(take.seen) == take.seen[6] == 1e-3


def test_a_scheduler_that_was_passed_is_left_alone_and_that_is_said(tiny_bert, token_data, tmp_path, caplog):
    model, take = tiny_bert(), recorder()
    given = torch.optim.SGD(model.parameters(), lr=0.01)
    halving = torch.optim.lr_scheduler.LambdaLR(given, lambda step: 0.5**step)
    trainer = train(
        model, token_data(), tmp_path, callbacks=[take], srste_lr_multiplier=2.0,
        parts={"optimizers": (given, halving)},
    )  # fmt: skip
    assert "as it is: srste_lr_multiplier=2.0 does not apply" in caplog.text
    assert trainer.lr_scheduler is halving and take.seen == [0.01 * 0.5**step for step in range(STEPS)]


@pytest.mark.parametrize("multiplier", [1.0, 2.0])
@pytest.mark.parametrize("admm_steps", [0, 0.5])
def test_a_run_of_no_epochs_trains_nothing(multiplier, admm_steps, tiny_bert, token_data, tmp_path):
    trainer = prepare(
        tiny_bert(), token_data(), tmp_path, max_steps=-1, num_train_epochs=0, admm_steps=admm_steps,
        srste_lr_multiplier=multiplier, admm_lr_scheduler_type="constant",
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 0


def test_a_resume_goes_on_at_the_same_rates(tiny_bert, token_data, tmp_path):
    def run(folder, **kwargs):
        model, take = tiny_bert(), recorder()
        trainer = prepare(
            model, token_data(), tmp_path / folder, callbacks=[take], lr_scheduler_type="cosine_with_min_lr",
            lr_scheduler_kwargs={"min_lr": 1e-4}, srste_lr_multiplier=2.0, save_strategy="steps", save_steps=4,
            parts={"optimizers": (torch.optim.AdamW(model.parameters(), lr=PEAK), None)},
        )  # fmt: skip
        trainer.train(**kwargs)
        return take.seen

    straight = run("straight")
    for step in (4, 8):
        resumed = run("resumed", resume_from_checkpoint=str(tmp_path / "straight" / f"checkpoint-{step}"))
        assert resumed == straight[step:]


@pytest.mark.parametrize("run, warmup, admm_steps", [(3, 2, 2), (2, 2, 1), (2, 1, 1), (10, 10, 6)])
@pytest.mark.parametrize("name", ["polynomial", "linear", "constant_with_warmup"])
def test_a_warm_up_leaves_a_step_of_every_phase(name, run, warmup, admm_steps, phased):
    """Plain `Trainer` trains at a rate above 0 in all of these, if not in each step."""
    found = rates(phased(name, run=run, admm_steps=admm_steps, warmup_steps=warmup), run)
    assert max(found[:admm_steps])[0] > 0 and max(found[admm_steps:])[0] > 0

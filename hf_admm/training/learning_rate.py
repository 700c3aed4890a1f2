"""The learning rate of a run in two phases: each has a whole schedule of its own."""

from dataclasses import fields

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler
from transformers.trainer_utils import SchedulerType

from hf_admm.console import get_logger
from hf_admm.pruning.schedules import join_segments


logger = get_logger(__name__)

# Arguments of transformers' schedules that count steps of the run.
STEP_COUNTS = ("num_stable_steps", "num_decay_steps", "timescale")


def phase_scheduler(args, optimizer: torch.optim.Optimizer, num_training_steps: int) -> LambdaLR | None:
    """
    A schedule of `lr_scheduler_type` for each phase, or of `admm_lr_scheduler_type` in phase 1: what plain `Trainer`
    would make for a run of that length with this optimizer, whose rates are those of the phase's peak. So an absolute
    floor (`min_lr`, `lr_end`) is the same in both phases, and a relative one follows the peak.

    Args:
        args ([`ADMMTrainingArguments`]):
            The arguments.
        optimizer (`torch.optim.Optimizer`):
            The optimizer in use: its rates count, not `learning_rate`.
        num_training_steps (`int`):
            Length of the run.

    Returns:
        `LambdaLR` or `None`: `None` where plain `Trainer`'s schedule is the right one.

    Raises:
        `ValueError`: If `lr_scheduler_kwargs` can't be shared out between the phases.
    """
    if num_training_steps <= 0:
        return None
    plan, last = args.phase_plan(num_training_steps), args.lr_multiplier
    segments = plan.segments
    peaks = [1.0, last] if len(segments) > 1 else [1.0 if plan.admm_steps else last]
    first, second = args.phase_schedulers
    kinds = ([first] if plan.admm_steps else []) + [second]
    if len(segments) == 1 and peaks == [1.0] and not kinds[0]:
        return None
    parts = [
        _segment(args, optimizer, num_training_steps, steps, peak, kind)
        for steps, peak, kind in zip(segments, peaks, kinds, strict=False)
    ]
    if not all(isinstance(part, LambdaLR) for part in parts):
        kind = SchedulerType(args.lr_scheduler_type).value
        logger.warning(
            f"lr_scheduler_type={kind} has no fixed length, so it runs through both phases, at one peak, instead of "
            "starting again at the switch. For a schedule in each phase choose one with an end: linear or cosine, say."
        )
        return None
    groups = zip(*(part.lr_lambdas for part in parts), strict=True)
    return LambdaLR(optimizer, [join_segments(list(multipliers), segments, peaks) for multipliers in groups])


def warn_of_unused_flags(args) -> None:
    """
    Names the flags that do not apply to a scheduler that was passed to the trainer.

    Args:
        args ([`ADMMTrainingArguments`]):
            The arguments.
    """
    flags = {field.name: field.default for field in fields(args)}
    changed = [
        f"{name}={getattr(args, name)}"
        for name in ("admm_lr_scheduler_type", "srste_lr_multiplier")
        if getattr(args, name) != flags[name]
    ]
    if changed:
        logger.warning(
            f"The learning-rate scheduler that was passed runs through both phases as it is: {', '.join(changed)} "
            "does not apply. For a schedule in each phase pass no scheduler, and set lr_scheduler_type."
        )
    elif args.trains_dense:
        logger.warning(
            "The learning-rate scheduler that was passed runs through the dense phase and the sparse one as it is: if "
            "it decays, little is left for the second. For a schedule in each phase pass no scheduler, and "
            "set lr_scheduler_type."
        )


def _segment(args, optimizer, run: int, steps: int, peak: float, kind: str | None):
    """The schedule of one phase, on a stand-in optimizer: only its multipliers are wanted."""
    warmup = args.get_warmup_steps(run)
    begun = min(round(warmup / run * steps), steps - 1)  # a warm-up alone would be a phase at a rate of 0
    kwargs = {"num_decay_steps": steps // 2, "decay_type": "linear"} if kind == "warmup_stable_decay" else None
    if not kind and args.lr_scheduler_kwargs:
        kwargs = _shares(args.lr_scheduler_kwargs, warmup, begun, steps, run)
        _check_floor(kwargs, _rate(optimizer), peak)
    return get_scheduler(
        kind or args.lr_scheduler_type,
        optimizer=_stand_in(optimizer, peak),
        num_warmup_steps=begun,
        num_training_steps=steps,
        scheduler_specific_kwargs=kwargs,
    )


def _rate(optimizer) -> float:
    """What transformers' schedules take for the rate of an optimizer, whatever its groups have."""
    rate = getattr(optimizer, "defaults", {}).get("lr")
    return float(optimizer.param_groups[0]["lr"] if rate is None else rate)


def _stand_in(optimizer, peak: float) -> torch.optim.Optimizer:
    groups = [
        {"params": [torch.zeros(1)], "lr": float(group.get("initial_lr", group["lr"])) * peak}
        for group in optimizer.param_groups
    ]
    return torch.optim.SGD(groups, lr=_rate(optimizer) * peak)


def _shares(kwargs: dict, warmup: int, begun: int, steps: int, run: int) -> dict:
    """
    The arguments of a schedule, with those that count steps of the run as the same share of `steps`.

    Args:
        kwargs (`dict`):
            The arguments.
        warmup (`int`):
            Steps of warm-up in the run.
        begun (`int`):
            Steps of warm-up in the segment.
        steps (`int`):
            Length of the segment.
        run (`int`):
            Length of the run.
    """
    if steps == run:
        return kwargs
    unknown = [name for name in kwargs if name.endswith("_steps") and name not in STEP_COUNTS]
    if unknown:
        raise ValueError(
            f"lr_scheduler_kwargs has {', '.join(unknown)}, which seem to count steps of the run: how they are to be "
            f"shared between the two phases is not known (it is for {', '.join(STEP_COUNTS)}). Leave them out, pass a "
            "scheduler of your own (optimizers=), or train in one "
            "phase (admm_steps=0; num_calibration_samples=1024 with it prunes by the data)."
        )
    shares, share = dict(kwargs), steps / run
    if kwargs.get("timescale") is not None:
        shares["timescale"] = kwargs["timescale"] * share
    stable, decay = kwargs.get("num_stable_steps"), kwargs.get("num_decay_steps")
    # Where each part ends is rounded, not its length, so that together they fill the segment as they fill the run.
    decay_from = run - (decay or 0) if stable is None else warmup + stable
    decay_to = run if stable is None else decay_from + (decay or 0)
    decay_from, decay_to = max(begun, round(decay_from * share)), round(decay_to * share)
    if stable is not None:
        shares["num_stable_steps"] = decay_from - begun
    if decay is not None:
        shares["num_decay_steps"] = max(0, decay_to - decay_from)
    return shares


def _check_floor(kwargs: dict, rate: float, peak: float) -> None:
    """A floor above the peak of a phase would make its rate climb; plain `Trainer` leaves that to the user."""
    for name in ("min_lr", "lr_end"):
        floor = kwargs.get(name)
        if floor is not None and peak * rate < floor <= rate:
            raise ValueError(
                f"srste_lr_multiplier={peak:g} sets the peak learning rate of phase 2 to {peak * rate:g}, below the "
                f"{name}={floor:g} of lr_scheduler_kwargs. Give a multiplier of at least {floor / rate:g}, or a lower "
                f"{name}."
            )

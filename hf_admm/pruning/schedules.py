"""How long each phase is, and how rho and the learning rate move in it: plain arithmetic."""

import math
from collections.abc import Callable
from dataclasses import dataclass


def _cosine(progress: float) -> float:
    return 0.5 * (1 - math.cos(math.pi * progress))


# Share of `admm_rho` in force as the first phase goes from 0 to 1. None decreases: a smaller rho would scale U up, and
# the support of Z could no longer be read off the anchor (docs/derivation.md).
RHO_SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: progress,
    "cosine": _cosine,
    "exponential": lambda progress: 10.0 ** (2 * (progress - 1)),
}


@dataclass(frozen=True)
class PhasePlan:
    """
    The steps of a run, by phase. All are optimizer steps.

    Args:
        max_steps (`int`):
            Length of the run.
        admm_steps (`int`):
            Length of phase 1; phase 2 has the rest.
        freeze_step (`int`):
            The step from which on the mask of phase 2 stays as it is.
        pull_start (`float`, *optional*, defaults to 0.6):
            The share of phase 1 after which `distance` begins to pull.
    """

    max_steps: int
    admm_steps: int
    freeze_step: int
    pull_start: float = 0.6

    @property
    def segments(self) -> list[int]:
        """Lengths of the phases that exist."""
        return [steps for steps in (self.admm_steps, self.max_steps - self.admm_steps) if steps]

    def pull_progress(self, step: int) -> float:
        """How far the last part of phase 1 is gone, in which `distance` pulls; 0 before it."""
        return max(0.0, (step / max(1, self.admm_steps) - self.pull_start) / (1 - self.pull_start))

    def shrinkage(self, total: float, step: int) -> float:
        """
        By what share the penalty of phase 1 shrinks a pruned entry after step `step`, relative to what is left of it.

        It is 0 while the dense weights learn the task; then it rises for half of what is left of the phase, and stays:
        what it is then, W is near the pattern, and trains there.

        Args:
            total (`float`):
                The sum over the phase.
            step (`int`):
                Optimizer steps done.
        """
        steps = max(1, self.admm_steps) * (1 - self.pull_start)
        return total / steps * _cosine(min(1.0, 2 * self.pull_progress(step + 1))) / 0.75

    def stage_progress(self, step: int) -> float:
        """How far the way to the final pattern is gone: it begins with the pull and ends halfway through it."""
        return min(1.0, 2 * self.pull_progress(step))

    def rho(self, admm_rho: float, schedule: str, step: int) -> float:
        """
        The penalty's strength from `step` on.

        Counted from the step after, so that a ramp starts above 0, where the scaled dual variable is not defined.
        """
        progress = min(1.0, (step + 1) / max(1, self.admm_steps))
        return admm_rho * RHO_SCHEDULES[schedule](progress)


def to_steps(name: str, value: float, max_steps: int) -> int:
    """
    Steps from a flag that holds a share of the run (below 1) or a number of steps, as `warmup_steps` does.

    Args:
        name (`str`):
            The flag, for the error.
        value (`float`):
            Its value.
        max_steps (`int`):
            Length of the run, in optimizer steps.

    Raises:
        `ValueError`: If there are more steps than the run has.
    """
    steps = round(value * max_steps) if value < 1 else int(value)
    if steps > max_steps:
        raise ValueError(
            f"{name}={float(value):g} is beyond the run, which has {max_steps} optimizer steps. Give a share of the "
            f"run (below 1), at most {max_steps} steps, or train longer (num_train_epochs, max_steps)."
        )
    return steps


def join_segments(
    multipliers: list[Callable[[int], float]], lengths: list[int], peaks: list[float]
) -> Callable[[int], float]:
    """
    One learning-rate multiplier that runs through several, each from its own step 0.

    Args:
        multipliers (`list[Callable[[int], float]]`):
            For each segment, from its step to the share of the peak learning rate.
        lengths (`list[int]`):
            Steps of each segment.
        peaks (`list[float]`):
            What the multiplier of each segment is multiplied by.
    """

    # A plain function: LambdaLR would write the attributes of any other callable into the checkpoint.
    def multiplier(step: int) -> float:
        for segment, length, peak in list(zip(multipliers, lengths, peaks, strict=True))[:-1]:
            if step < length:
                return peak * segment(step)
            step -= length
        return peaks[-1] * multipliers[-1](step)

    return multiplier

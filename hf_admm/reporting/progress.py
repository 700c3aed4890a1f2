"""What stands beside the progress bar."""

from collections.abc import Mapping

from hf_admm.pruning.schedules import PhasePlan


# Of what is logged, what tells most of a run, by phase. In phase 2 the residual is what was cut off at the switch.
_FIGURES = {
    1: {"admm/primal_residual": "residual", "admm/mask_flips": "flips"},
    2: {"admm/switch_residual": "residual", "admm/mask_flips": "flips"},
}


def bar_words(number: int, logs: Mapping[str, float], plan: PhasePlan) -> str:
    """
    Words for the progress bar.

    Args:
        number (`int`):
            The phase.
        logs (`Mapping[str, float]`):
            The figures that were last logged in it.
        plan ([`PhasePlan`]):
            The steps of the run.

    Returns:
        `str`: `"phase 1/2, residual 0.031, flips 0.0012"`; without the phase, if there is no first one.
    """
    figures = [f"{word} {logs[name]:.2g}" for name, word in _FIGURES[number].items() if name in logs]
    phase = [f"phase {number}" + ("/2" if len(plan.segments) == 2 else "")] if plan.admm_steps else []
    return ", ".join([*phase, *figures])

"""The settings of a run in words: what each phase does, for how long, with what beside the weights."""

import os

from hf_admm.pruning.phases import PhaseSettings
from hf_admm.sparsity.patterns import BlockPattern, DensityPattern, NMPattern, OwnPattern, SparsityPattern


def pattern_words(pattern: SparsityPattern) -> str:
    """What a pattern means: `"2 of every 4 consecutive inputs are kept"`."""
    if isinstance(pattern, NMPattern):
        return f"{pattern.kept} of every {pattern.group_size} consecutive inputs are kept"
    if isinstance(pattern, BlockPattern):
        return f"{pattern.kept} of every block of {pattern.rows} outputs by {pattern.columns} inputs are kept"
    if isinstance(pattern, DensityPattern):
        return f"{pattern.density:.0%} of each weight are kept, anywhere"
    if isinstance(pattern, OwnPattern):
        return "the zeros that the model came with stay"
    return f"{pattern.density:.0%} of each weight are kept"


def phase_words(args, max_steps: int) -> list[tuple[str, str]]:
    """
    What each phase of a run does.

    Args:
        args ([`ADMMTrainingArguments`]):
            The arguments of the run.
        max_steps (`int`):
            Its length, in optimizer steps.

    Returns:
        `list[tuple[str, str]]`: For each phase that the run has, its name (`"training"` if there is no phase 1) and a
            line.
    """
    if args.is_own:
        return [("training", f"{max_steps} steps with a mask that does not move")]
    settings = args.phase_settings(max_steps)
    plan, words = settings.plan, []
    if plan.admm_steps:
        words.append(("phase 1", f"{plan.admm_steps} steps: {_first_phase(settings)}"))
    if plan.admm_steps < max_steps:
        name = "phase 2" if plan.admm_steps else "training"
        words.append((name, f"{max_steps - plan.admm_steps} steps: {_second_phase(args, settings)}"))
    return words


def _first_phase(settings: PhaseSettings) -> str:
    if settings.penalty is None:
        return "dense training"
    if not settings.rho:
        return "dense training (rho 0)"
    if settings.penalty == "distance":
        pulls = f"penalty distance from step {round(settings.plan.pull_start * settings.plan.admm_steps)}"
        return f"{pulls}, rho {settings.rho:g}, mask updated every {_steps(settings.update_steps)}"
    growing = "" if settings.rho_schedule == "constant" else f" ({settings.rho_schedule})"
    updates = f"Z and U updated every {_steps(settings.update_steps)}"
    return f"ADMM, penalty {settings.penalty}, rho {settings.rho:g}{growing}, {updates}"


def _second_phase(args, settings: PhaseSettings) -> str:
    plan = settings.plan
    frozen = max(plan.admm_steps, plan.freeze_step)
    moves = frozen > plan.admm_steps
    parts = []
    if args.calibration_samples:
        parts.append(f"pruned by layer-wise ADMM with up to {args.calibration_samples} rows")
    if moves or not parts:
        parts.append("SR-STE")
    as_before = settings.decay is None and settings.mask_update_steps == settings.update_steps
    if moves and as_before:
        parts.append("mask and decay as in phase 1")
    elif moves and settings.mask_update_steps > 1:
        parts.append(f"mask updated every {settings.mask_update_steps} steps")
    if not moves:
        parts.append("mask frozen")
    elif frozen < plan.max_steps:
        parts.append(f"frozen in the last {plan.max_steps - frozen}")
    if settings.decay is not None and (moves or settings.decay):
        parts.append(f"decay {settings.decay:g}")
    elif moves and not as_before:
        parts.append("decay as in phase 1")
    if args.lr_multiplier != 1:
        parts.append(f"learning rate x {args.lr_multiplier:g}")
    return ", ".join(parts)


def _steps(count: int) -> str:
    return "step" if count == 1 else f"{count} steps"


def set_flags(args, max_steps: int) -> dict[str, str]:
    """
    The flags of both phases with the values that were in force, for the record.

    Args:
        args ([`ADMMTrainingArguments`]):
            The arguments of the run.
        max_steps (`int`):
            Its length, in optimizer steps.

    Returns:
        `dict[str, str]`: The values by flag. What another choice leaves without effect is not there.
    """
    settings = args.phase_settings(max_steps)
    plan = settings.plan
    flags = {"sparsity_pattern": str(args.pattern)}
    for name in ("sparsity_include", "sparsity_exclude"):
        if value := getattr(args, name):
            flags[name] = value if isinstance(value, str) else " ".join(value)
    if not args.is_own:
        flags["admm_steps"] = str(plan.admm_steps)
        if plan.admm_steps < max_steps and args.calibration_samples:
            default = " (by default: fewer, where texts are long)" if args.num_calibration_samples is None else ""
            flags["num_calibration_samples"] = f"{args.calibration_samples}{default}"
    if plan.admm_steps:
        if settings.penalty is not None:
            flags["admm_penalty"] = settings.penalty
        flags["admm_rho"] = f"{settings.rho:g}"
        if settings.rho:
            flags["admm_update_steps"] = str(settings.update_steps)
        if settings.rho and settings.penalty != "distance":
            flags |= {"admm_rho_schedule": settings.rho_schedule, "admm_state_dtype": args.admm_state_dtype}
        flags["admm_lr_scheduler_type"] = args.phase_schedulers[0] or _plain(args.lr_scheduler_type)
    if plan.admm_steps < plan.max_steps and not args.is_own:
        flags |= {
            "srste_mask": args.mask_mode,
            "srste_decay": "as at the end of phase 1" if settings.decay is None else f"{settings.decay:g}",
            "srste_lr_multiplier": f"{args.lr_multiplier:g}",
            "mask_update_steps": str(settings.mask_update_steps),
            "mask_freeze_steps": str(plan.max_steps - plan.freeze_step),
        }
    if args.distill_teacher is not None:
        flags["distill_teacher"] = model_name(args.distill_teacher)
        flags |= {name: f"{getattr(args, name):g}" for name in ("distill_logits_weight", "distill_temperature")}
        flags["distill_hidden_weight"] = f"{args.hidden_weight:g}"
    return flags | {"max_steps": str(max_steps)}


def model_name(name_or_path: str) -> str:
    """The id of a model, and of a folder its name alone: where it lies is nobody else's business."""
    return os.path.basename(os.path.abspath(name_or_path)) if os.path.isdir(name_or_path) else name_or_path


def _plain(value) -> str:
    return str(getattr(value, "value", value))

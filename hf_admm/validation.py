"""What the flags of sparse fine-tuning may be."""

from dataclasses import fields
from numbers import Integral, Real

from hf_admm.pruning.defaults import PENALTIES
from hf_admm.pruning.schedules import RHO_SCHEDULES


MASK_MODES = ("dynamic", "fixed")
STATE_DTYPES = ("float32", "bfloat16")
# Those that need no lr_scheduler_kwargs, and end when they are told to; the last decays in the second half.
PLAIN_SCHEDULERS = (
    "linear",
    "cosine",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "warmup_stable_decay",
)

# What says how a mask is found. `srste_mask` is not among them: either of its values describes a mask that stays.
_OF_PHASES = (
    "admm_steps",
    "admm_penalty",
    "admm_rho",
    "admm_rho_schedule",
    "admm_update_steps",
    "admm_state_dtype",
    "admm_state_offload",
    "admm_lr_scheduler_type",
    "num_calibration_samples",
    "srste_decay",
    "srste_lr_multiplier",
    "mask_update_steps",
    "mask_freeze_steps",
)
REALS = ("admm_rho", "srste_decay", "srste_lr_multiplier", "admm_steps", "mask_freeze_steps")
# Beyond these, what is computed with a flag leaves the range of float32 or int64 and fails far away from here: a ramp
# from a smaller rho starts at 0, which nothing can be divided by.
_LEAST_RHO, _MOST = 1e-30, 1e30
_MOST_SHOWN = 200  # characters of a value
_LONGEST = 2**63 - 1
# The least, the most, and the words for it.
_DISTILLATION = {
    "distill_logits_weight": (0, 1, "a number from 0 to 1"),
    "distill_hidden_weight": (0, 1e6, "a number from 0 to 1e6"),
    "distill_temperature": (1e-2, 1e3, "a number from 0.01 to 1000"),
}


def validate_flags(args) -> None:
    """
    Checks the flags of [`ADMMTrainingArguments`].

    Args:
        args ([`ADMMTrainingArguments`]):
            The arguments.

    Raises:
        `ValueError`: If a flag has a value that is not allowed; the message says which are.
    """
    if not isinstance(args.sparsity_pattern, str):
        raise ValueError(
            f"sparsity_pattern={_shown(args.sparsity_pattern)} is not a string. YAML reads an unquoted 2:4 as a "
            'number in base 60: write "2:4" in quotes. To prune nothing, give "none".'
        )
    args.pattern  # noqa: B018  (parsing it is the check)
    for name, allowed in (
        ("admm_rho_schedule", tuple(RHO_SCHEDULES)),
        ("admm_penalty", tuple(PENALTIES)),
        ("srste_mask", MASK_MODES),
        ("admm_state_dtype", STATE_DTYPES),
        ("admm_lr_scheduler_type", PLAIN_SCHEDULERS),
    ):
        value = getattr(args, name)
        if value is None and name in ("admm_lr_scheduler_type", "admm_penalty", "srste_mask"):
            continue
        if not (isinstance(value, str) and value in allowed):
            raise ValueError(f"{name}={_shown(value)} is unknown. Allowed: {', '.join(allowed)}.")
    for name in REALS:
        value = getattr(args, name)
        if value is None and name != "mask_freeze_steps":
            continue
        least = _LEAST_RHO if name == "admm_rho" else 0
        if not (_is(Real, value) and (value == 0 or least <= value <= _MOST)):
            raise ValueError(
                f"{name}={_shown(value)} is not allowed: give a finite number of at least 0"
                + (f" (0, or from {least:g} to {_MOST:g})." if least else f" (and at most {_MOST:g}).")
            )
    if args.srste_lr_multiplier == 0:
        raise ValueError(
            "srste_lr_multiplier=0 is not allowed: phase 2 would not learn at all. Give a number above 0."
        )
    for name in ("admm_update_steps", "mask_update_steps"):
        value = getattr(args, name)
        if value is None:
            continue
        if not (_is(Integral, value) and 1 <= value <= _LONGEST):
            raise ValueError(
                f"{name}={_shown(value)} is not allowed: it is an interval, give a whole number of at least 1 "
                f"optimizer step (and at most {_LONGEST})."
            )
    value = args.num_calibration_samples
    if value is not None and not (_is(Integral, value) and 0 <= value <= _LONGEST):
        raise ValueError(
            f"num_calibration_samples={_shown(value)} is not allowed: give a number of rows, such as 1024, or 0."
        )
    for name in ("admm_steps", "mask_freeze_steps"):
        value = getattr(args, name)
        if value is not None and value >= 1 and value != int(value):
            raise ValueError(
                f"{name}={value} is neither a share of the run (below 1) nor a whole number of optimizer steps."
            )
    for name in ("admm_state_offload", "sparsity_report"):
        if not isinstance(value := getattr(args, name), bool):
            raise ValueError(f"{name}={_shown(value)} is not allowed: give true or false.")
    for name in ("sparsity_include", "sparsity_exclude"):
        value = getattr(args, name)
        names = value if isinstance(value, list | tuple) else [] if value is None else [value]
        if not all(isinstance(entry, str) for entry in names):
            raise ValueError(
                f"{name}={_shown(value)} is not allowed: give names of modules as strings, in a list, or one "
                "regular expression."
            )
    _validate_distillation(args)
    if not args.is_sparse:
        return
    _validate_own_mask(args)
    optim = str(getattr(args.optim, "value", args.optim))
    if optim.endswith(("lomo", "layerwise")):
        raise ValueError(
            f"optim={optim!r} is not supported by sparse training: it steps within the backward pass, behind the "
            "mask's back. Choose another optimizer, or set sparsity_pattern='none'."
        )


def _validate_own_mask(args) -> None:
    """A mask that is known from the start leaves nothing to search, to draw near or to schedule by phases."""
    if not args.is_own:
        return
    defaults = {field.name: field.default for field in fields(args)}
    allowed = {name: (defaults[name],) for name in _OF_PHASES} | {
        "admm_steps": (None, 0),
        "num_calibration_samples": (None, 0),
    }
    given = [f"{name}={_shown(getattr(args, name))}" for name in allowed if getattr(args, name) not in allowed[name]]
    if given:
        raise ValueError(
            f"sparsity_pattern='own' keeps the zeros that the model has from the first step on, at learning_rate: "
            f"there are no phases, and {', '.join(given)} would have no effect. Leave them away, or give the pattern "
            "to which the model is to be pruned, such as '2:4'."
        )


def _validate_distillation(args) -> None:
    faults, teacher = [], args.distill_teacher
    if teacher is not None and not (isinstance(teacher, str) and teacher.strip()):
        allowed = "a folder, a hub id, 'self' or 'switch'"
        faults.append(f"distill_teacher={_shown(teacher)} is not allowed: give {allowed}")
    if args.learns_from_switch and (not args.is_sparse or args.is_own):
        faults.append(
            f"distill_teacher='switch' is the model that phase 1 ends with, and with sparsity_pattern="
            f"{_shown(args.sparsity_pattern)} there are no phases: give another teacher, or a pattern such as '2:4'"
        )
    elif args.learns_from_switch and args.admm_steps == 0:
        faults.append(
            "distill_teacher='switch' is the model that phase 1 ends with, and with admm_steps=0 there is none: leave "
            "admm_steps away, or set distill_teacher='self'"
        )
    for name, (least, most, allowed) in _DISTILLATION.items():
        value = getattr(args, name)
        if value is None and name == "distill_hidden_weight":
            continue
        if not (_is(Real, value) and least <= value <= most):
            faults.append(f"{name}={_shown(value)} is not allowed: give {allowed}")
    if not faults and teacher is not None and args.distill_logits_weight == args.hidden_weight == 0:
        faults.append(
            f"distill_teacher={teacher!r} would teach nothing: distill_logits_weight and distill_hidden_weight are "
            "both 0. Raise one of them, or leave distill_teacher away"
        )
    if faults:
        raise ValueError("; ".join(faults) + ".")


def unsupported_backend(name: str) -> str:
    """The message for a backend that sparse training does not support."""
    return (
        f"Sparse training under {name} is not supported (of DeepSpeed, only ZeRO of stages 1 and 2 is; FSDP1 is not): "
        "its shards of the weights are out of reach of the pruning step. Train in one process, with DDP or with FSDP2 "
        "(fsdp_config={'version': 2}), or set sparsity_pattern='none'."
    )


def _is(kind: type, value) -> bool:
    """A yes or no is no number, though Python counts with it."""
    return isinstance(value, kind) and not isinstance(value, bool)


def _shown(value) -> str:
    """
    `repr`, which refuses integers of thousands of digits with an error that names no flag, and shows all of a model.
    """
    try:
        shown = repr(value)
        if len(shown) <= _MOST_SHOWN:
            return shown
        plain = isinstance(value, str | list | tuple | dict)
        return f"{shown[:_MOST_SHOWN]}..." if plain else f"a {type(value).__name__}"
    except ValueError:
        return f"a {type(value).__name__} with too many digits to show"

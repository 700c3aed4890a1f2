"""Which runs can be sparse under DeepSpeed, whose engine takes the step within the backward pass."""

import json
from collections.abc import Mapping
from pathlib import Path

from hf_admm.validation import unsupported_backend


# Sections of a configuration that put something of DeepSpeed's in the place of what Trainer makes.
_OF_TRAINER = ("optimizer", "scheduler")


def refuse_stage(config: Mapping | str | None) -> Mapping:
    """
    Lets through ZeRO of stages 1 and 2, under which the model holds whole weights.

    Args:
        config (`Mapping` or `str`, *optional*):
            The configuration of DeepSpeed, or the file that holds it.

    Returns:
        `Mapping`: Its section on ZeRO.

    Raises:
        `ValueError`: If it is another stage, or can't be read.
    """
    zero = _read(config).get("zero_optimization") or {}
    if zero.get("stage") not in (1, 2):
        raise ValueError(unsupported_backend("DeepSpeed"))
    return zero


def refuse_deepspeed(args, config: Mapping | str | None) -> None:
    """
    Lets through what [`refuse_stage`] does, where no penalty joins the gradient: that is out of reach.

    Args:
        args ([`ADMMTrainingArguments`]):
            The arguments.
        config (`Mapping` or `str`, *optional*):
            The configuration of DeepSpeed, or the file that holds it.

    Raises:
        `ValueError`: If the run is not supported; the message names all that is in the way.
    """
    zero, config = refuse_stage(config), _read(config)
    faults = [f"zero_optimization.{key} is given" for key in zero if key.startswith("offload_") and _is_on(zero[key])]
    faults += [f"a section '{name}' is given, which Trainer is to make" for name in _OF_TRAINER if config.get(name)]
    if args.fp16 or (config.get("fp16") or {}).get("enabled") is True:
        faults.append("fp16 is on")
    if args.is_own:
        faults.append("sparsity_pattern='own' masks the gradient")
    elif args.penalty != "distance":
        faults.append(f"admm_penalty={args.penalty!r} joins the gradient or the step")
    elif args.srste_decay or (
        args.srste_decay is None and args.mask_mode != "fixed" and not (args.phase_1_length and args.rho)
    ):
        faults.append("srste_decay joins the gradient of phase 2")
    if args.swaps_weights:
        faults.append(f"optim={args.optim} swaps weights")
    if faults:
        raise ValueError(
            f"Sparse training under DeepSpeed: {'; '.join(faults)}. Supported are ZeRO of stages 1 and 2 in float32 "
            "or bfloat16 without offloading, with admm_penalty='distance', a phase 1 with it or a fixed mask, and "
            "srste_decay left away. Change that, train with DDP or FSDP2, or set sparsity_pattern='none'."
        )


def _read(config: Mapping | str | None) -> Mapping:
    """An unreadable file is refused as DeepSpeed is: what it would ask for is not known."""
    if isinstance(config, Mapping):
        return config
    try:
        return json.loads(Path(config).read_text(encoding="utf-8"))
    except (OSError, TypeError, ValueError):
        return {}


def _is_on(section) -> bool:
    return isinstance(section, Mapping) and section.get("device", "none") != "none"

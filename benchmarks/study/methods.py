"""
What is compared. A method is ours with some flags set otherwise, so that all share its schedule and rates unless the
method itself says differently; a flag that `ADMMTrainingArguments` gains reaches all of them.
"""

import importlib.util
from dataclasses import dataclass, field, fields

from hf_admm import ADMMTrainingArguments
from hf_admm.pruning.defaults import CALIBRATION_SAMPLES, DENSE_PHASE


NO_PENALTY = {"admm_penalty": "distance", "admm_rho": 0.0}  # with the rates of ours
FIXED_MASK = {"srste_mask": "fixed", "srste_decay": 0.0}
SR_STE = {"srste_mask": "dynamic", "srste_decay": 2e-4}
# Phase 1 by its defaults, and phase 2.
TWO_PHASES = {"num_calibration_samples": 0}
# One phase and one schedule, at the rate of the others' first phase or at twice it, whichever does better.
ONE_PHASE = {"admm_steps": 0.0, "srste_lr_multiplier": 1.0}
DENSE_HALF = {"num_calibration_samples": CALIBRATION_SAMPLES, "admm_steps": DENSE_PHASE, "admm_rho": 0.0}
LAYERWISE = ONE_PHASE | {"num_calibration_samples": CALIBRATION_SAMPLES}

# Of these, phase 1 knows nothing: methods that differ in no other flag reach the switch with the same bits.
PHASE_2_FLAGS = (
    "num_calibration_samples",
    "srste_mask",
    "srste_decay",
    "srste_lr_multiplier",
    "mask_update_steps",
    "mask_freeze_steps",
)


@dataclass(frozen=True)
class Method:
    """
    A way to train.

    Args:
        name (`str`):
            On the command line and in the results.
        title (`str`):
            In the tables.
        about (`str`):
            In a sentence, for the docs.
        flags (`dict`, *optional*):
            Flags of `ADMMTrainingArguments` that differ from ours.
        kind (`str`, *optional*, defaults to `"ours"`):
            How it trains: `"ours"` (ADMMTrainer), the same after `"sparsegpt"`, with SparseGPT where it prunes by the
            data (`"sparsegpt_in_run"`), `"dense"` or `"pat"`.
        rates (`tuple[float, ...]`, *optional*, defaults to `(1.0,)`):
            The learning rates to try, as multiples of the task's. The best by its mean over seeds is reported.
        stage (`int`, *optional*, defaults to 2):
            What decides first has the lowest and runs first.
        averages (`bool`, *optional*, defaults to `False`):
            Whether the weights of the last part of the run are averaged.
        taught (`bool`, *optional*, defaults to `False`):
            Whether the dense model of the same task and seed is its teacher.
    """

    name: str
    title: str
    about: str
    flags: dict = field(default_factory=dict)
    kind: str = "ours"
    rates: tuple[float, ...] = (1.0,)
    stage: int = 2
    averages: bool = False
    taught: bool = False

    @property
    def dense(self) -> bool:
        """Whether nothing is pruned."""
        return self.kind == "dense"


_THREE = (1.0, 0.5, 2.0)
_TWO = (1.0, 2.0)
_ALL = (
    Method(
        "dense",
        "dense",
        "no pruning, with the schedule and the rates of ADMM, SR-STE in both its segments, equal optimizer steps, the "
        "best of the learning rates that were run",
        TWO_PHASES,
        kind="dense",
        rates=_THREE,
        stage=0,
    ),
    Method(
        "dense_averaged",
        "dense, averaged",
        "the same, and the weights of the last tenth of the run averaged",
        TWO_PHASES,
        kind="dense",
        rates=_THREE,
        averages=True,
    ),
    Method(
        "dense_linear",
        "dense, one schedule",
        "no pruning, with the one schedule of ours, the best of the learning rates that were run",
        ONE_PHASE,
        kind="dense",
        rates=_THREE,
    ),
    Method(
        "ours",
        "ours",
        "`ADMMTrainingArguments()` as it is: layer-wise ADMM before training, or after a dense half where less than "
        "half is kept, then a fixed mask",
        stage=0,
    ),
    Method(
        "two_phases",
        "ADMM, SR-STE",
        "ADMM in the training of phase 1, then SR-STE in phase 2",
        TWO_PHASES,
        stage=0,
    ),
    Method(
        "ours_teacher",
        "ours with a teacher",
        "the same, distilled from the dense model of the same task and seed, whose steps come on top",
        stage=1,
        taught=True,
    ),
    Method(
        "two_phases_teacher",
        "ADMM, SR-STE with a teacher",
        "ADMM, SR-STE, distilled from the dense model of the same task and seed, whose steps come on top",
        TWO_PHASES,
        stage=1,
        taught=True,
    ),
    Method(
        "self_taught",
        "taught by its phase 1",
        "`distill_teacher='switch'`: half of the run trains the dense model, which is pruned by layer-wise ADMM then, "
        "and teaches the rest; no steps on top",
        {"distill_teacher": "switch"},
        stage=1,
    ),
    Method(
        "dense_half",
        "ours after a dense half",
        "dense training for half of the run, then layer-wise ADMM and a fixed mask: ours where less than half is kept",
        DENSE_HALF,
        stage=1,
    ),
    Method(
        "rho0",
        "rho 0, SR-STE",
        "the schedule of ADMM, SR-STE, phase 1 without ADMM",
        NO_PENALTY,
        stage=0,
    ),
    Method(
        "admm_fixed",
        "ADMM, fixed mask",
        "the mask that ADMM ends with, frozen at the switch",
        TWO_PHASES | FIXED_MASK,
    ),
    Method("asp", "ASP", "dense training, cut by magnitude at the switch, then a fixed mask", NO_PENALTY | FIXED_MASK),
    Method(
        "sr_ste",
        "SR-STE alone",
        "sparse from the first step, the published decay of 2e-4; the better of two learning rates",
        ONE_PHASE | SR_STE,
        rates=_TWO,
    ),
    Method(
        "sparsegpt",
        "SparseGPT, fixed mask",
        "pruned by SparseGPT before training, with rows of the task; the better of two learning rates",
        ONE_PHASE | FIXED_MASK,
        kind="sparsegpt",
        rates=_TWO,
    ),
    Method(
        "ours_sparsegpt",
        "ours, by SparseGPT",
        "ours, but that SparseGPT prunes the layers, by the same rows and at the same step",
        kind="sparsegpt_in_run",
    ),
    Method(
        "layerwise",
        "layer-wise ADMM, fixed mask",
        "pruned by ADMM before training, layer by layer so that outputs change least, with rows of the task; the "
        "better of two learning rates",
        LAYERWISE | FIXED_MASK,
        rates=_TWO,
    ),
    Method(
        "layerwise_sr_ste",
        "layer-wise ADMM, SR-STE",
        "the same, and the mask goes on moving with the published decay of 2e-4",
        LAYERWISE | SR_STE,
        rates=_TWO,
    ),
    Method(
        "pat",
        "PAT",
        "torchao's proximal pruning from the first step; the better of two learning rates",
        kind="pat",
        rates=_TWO,
    ),
)
METHODS = {method.name: method for method in _ALL}


def left_out() -> dict[str, str]:
    """The methods that can't be run here, and why."""
    missing = {}
    if "distill_teacher" not in {item.name for item in fields(ADMMTrainingArguments)}:
        missing |= {name: "ADMMTrainingArguments has no distill_teacher" for name in METHODS if METHODS[name].taught}
    if importlib.util.find_spec("torchao") is None:
        missing["pat"] = "torchao is not installed (extra bench)"
    return missing


def choose(names: list[str] | None = None) -> dict[str, Method]:
    """
    Looks up methods.

    Args:
        names (`list[str]`, *optional*):
            Their names; by default, all that can be run here.

    Raises:
        `ValueError`: If there is no such method, or it can't be run here.
    """
    missing = left_out()
    names = [name for name in METHODS if name not in missing] if names is None else names
    if unknown := [name for name in names if name not in METHODS]:
        raise ValueError(f"Unknown methods: {', '.join(unknown)}. Allowed: {', '.join(METHODS)}.")
    if absent := [f"{name} ({missing[name]})" for name in names if name in missing]:
        raise ValueError(f"These methods can't be run here: {', '.join(absent)}. Leave them out of --methods.")
    return {name: METHODS[name] for name in names}

"""What is taken for the flags that are not given: it depends on the penalty (docs/derivation.md, "The distance")."""

from dataclasses import dataclass

from hf_admm.sparsity.patterns import SparsityPattern


@dataclass(frozen=True)
class PenaltyDefaults:
    """
    What suits a penalty of phase 1.

    Args:
        rho (`float`):
            For `admm_rho`.
        update_steps (`int`, *optional*):
            For `admm_update_steps`. `None`: a 24th of phase 1.
        decay (`float`, *optional*):
            For `srste_decay`. `None`: pruned entries shrink on as at the end of phase 1.
        mask_update_steps (`int`, *optional*, defaults to 1):
            For `mask_update_steps`, where `srste_decay` is not given either. `None`: as in phase 1, since the
            pruned entries shrink on and hardly any comes back.
        lr_scheduler_type (`str`, *optional*):
            For `admm_lr_scheduler_type`, where `lr_scheduler_type` is not given either. `None`: the same in both.
        lr_multiplier (`float`, *optional*, defaults to 1.0):
            For `srste_lr_multiplier`.
    """

    rho: float
    update_steps: int | None = 64
    decay: float | None = 2e-4  # SR-STE's lambda as published
    mask_update_steps: int | None = 1
    lr_scheduler_type: str | None = None
    lr_multiplier: float = 1.0


PENALTIES = {
    "distance": PenaltyDefaults(
        rho=16.0,
        update_steps=None,
        decay=None,
        mask_update_steps=None,
        lr_scheduler_type="constant_with_warmup",
        lr_multiplier=2.0,
    ),
    "loss": PenaltyDefaults(rho=1e-2),
    "gradient": PenaltyDefaults(rho=3e-3),
    "decoupled": PenaltyDefaults(rho=10.0),
}
# Rows with which a model is pruned before it trains: drawing it to the pattern while it trains costs accuracy. With
# fewer, short texts have hardly more tokens than a layer has inputs (docs/one_shot.md).
CALIBRATION_SAMPLES = 1024
# Of them, as many as give every layer so many tokens per input: texts of thousands of tokens need few rows.
CALIBRATION_TOKENS = 16
# Where less than this is kept, a model learns a small task only before it is pruned, and at a higher rate after it.
FEW = 0.5
# Share of the run, where there is a phase 1.
PHASE_1 = 0.6
# The same, where it trains the dense model that is pruned then, and may teach phase 2.
DENSE_PHASE = 0.5
# Updates of the mask in phase 1, where their interval adapts.
UPDATES = 24


def pull_start(pattern: SparsityPattern) -> float:
    """
    After what share of phase 1 `distance` begins to pull. Small tasks lose accuracy if it pulls while they are learnt;
    the way to few kept entries takes longer (docs/derivation.md).
    """
    return 0.6 if pattern.density >= FEW else 0.3

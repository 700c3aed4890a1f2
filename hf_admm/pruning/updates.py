"""The steps of the method as pure functions on tensors (derived in docs/derivation.md).

Each goes through a weight in chunks. The anchor may be of another dtype than the weight and on another device.
"""

import math
from collections.abc import Sequence

import torch

from hf_admm.sparsity.chunks import row_chunks
from hf_admm.sparsity.patterns import SparsityPattern
from hf_admm.sparsity.projections import group_rows, sparsity_mask, zero_outside


def pull(gradient: torch.Tensor, weight: torch.Tensor, anchor: torch.Tensor, strength: float) -> None:
    """
    Adds `strength * (weight - anchor)` to a gradient, in place: the gradient of `strength / 2 * ||W - T||^2`.

    Phase 1 pulls W towards T = Z - U with rho, phase 2 towards T = M*W with SR-STE's lambda.

    Args:
        gradient, weight, anchor (`torch.Tensor`):
            Tensors of one shape.
        strength (`float`):
            The factor.
    """
    for g, w, t in row_chunks(gradient, weight, anchor):
        # The difference first: in half precision, `strength * weight` would swallow a small gradient.
        g.add_(_beside(w, g) - _beside(t, g), alpha=strength)


def proximal_step(weight: torch.Tensor, anchor: torch.Tensor, step: float) -> None:
    """
    The exact minimiser of `step / 2 * ||X - T||^2 + 1 / 2 * ||X - W||^2`, in place: W moves by `step / (1 + step)` of
    its way to the anchor, so it never overshoots.

    Args:
        weight, anchor (`torch.Tensor`):
            Tensors of one shape.
        step (`float`):
            The learning rate times rho.
    """
    for w, t in row_chunks(weight, anchor):
        w.lerp_(_beside(t, w).to(w.dtype), step / (1 + step))


def dual_step(
    weight: torch.Tensor, anchor: torch.Tensor, pattern: SparsityPattern, transposed: bool, rescale: float
) -> torch.Tensor:
    """
    The Z-step and the U-step: v = W + U, Z = Pi(v), U = v - Z.

    Args:
        weight (`torch.Tensor`):
            W, of any floating-point dtype.
        anchor (`torch.Tensor`):
            T = Z - U, updated in place. It is computed in float32 and rounded to the anchor's dtype.
        pattern ([`SparsityPattern`]):
            The pattern.
        transposed (`bool`):
            Whether the input dimension comes first.
        rescale (`float`):
            `rho_old / rho_new`, at most 1: the dual variable is U times rho, and must not jump when rho grows.

    Returns:
        `torch.Tensor` of shape `(7,)`, in float64: The sums that residuals are made of: squares of W - Z, W, Z,
        Z - Z_old and U, then the entries whose mask flipped, and those kept.
    """
    sums = torch.zeros(7, dtype=torch.float64, device=weight.device)
    for w, t in row_chunks(weight, anchor, multiple=group_rows(pattern, transposed, len(weight))):
        w, old = w.float(), _beside(t, w).float()
        old_mask = sparsity_mask(old, pattern, transposed)
        old_z = zero_outside(old.clone(), old_mask)
        v = w + (old_z - old)
        mask = sparsity_mask(v, pattern, transposed)
        z = zero_outside(v.clone(), mask)
        u = v - z
        squares = [part.square().sum() for part in (w - z, w, z, z - old_z, u)]
        sums += torch.stack([*squares, (mask != old_mask).sum(), mask.sum()])
        t.copy_(z.sub_(u, alpha=rescale))
    return sums


def residuals(sums: Sequence[float], entries: int) -> dict[str, float]:
    """
    What is logged of a dual step.

    Args:
        sums (`Sequence[float]`):
            Those of [`dual_step`], over all weights.
        entries (`int`):
            Of all weights.

    Returns:
        `dict[str, float]`: The relative primal and dual residuals, the share of mask flips and the sparsity of Z.
    """
    *squares, flips, kept = sums
    primal, weight_norm, z_norm, dual, u_norm = (square**0.5 for square in squares)
    return {
        "primal_residual": primal / max(weight_norm, z_norm, torch.finfo(torch.float32).tiny),
        "dual_residual": dual / u_norm if u_norm else 0.0,
        "mask_flips": flips / entries,
        "sparsity": 1 - kept / entries,
    }


def squared_distance(weight: torch.Tensor, anchor: torch.Tensor) -> torch.Tensor:
    """`||W - T||^2`, as a scalar tensor in float64."""
    squares = torch.zeros((), dtype=torch.float64, device=weight.device)
    for w, t in row_chunks(weight, anchor):
        squares += (w - _beside(t, w)).square().sum()
    return squares


def shrink_outside(weight: torch.Tensor, mask: torch.Tensor, share: float, steps: int = 1) -> None:
    """
    The exact minimiser of `share / 2 * ||(1 - M) * X||^2 + 1 / 2 * ||X - W||^2`, in place: entries outside of the mask
    lose `share / (1 + share)` of their size. Several such steps at once leave `1 / (1 + share) ** steps` of it.

    Args:
        weight (`torch.Tensor`):
            W.
        mask (`torch.BoolTensor`):
            M, of its shape.
        share (`float`):
            The strength of the penalty times the step size.
        steps (`int`, *optional*, defaults to 1):
            How many steps to take.
    """
    lost = -math.expm1(-steps * math.log1p(share))
    for w, kept in row_chunks(weight, mask):
        pruned = kept.view(torch.int8) - 1  # 0 or -1; bytes become floats three times as fast as truth values do
        w.mul_(pruned.to(w.dtype).mul_(lost).add_(1))


def squared_norm(weight: torch.Tensor) -> torch.Tensor:
    """`||W||^2`, as a scalar tensor in float64."""
    squares = torch.zeros((), dtype=torch.float64, device=weight.device)
    for (w,) in row_chunks(weight):
        squares += w.square().sum()
    return squares


def squared_outside(weight: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`||(1 - M) * W||^2`, as a scalar tensor in float64."""
    squares = torch.zeros((), dtype=torch.float64, device=weight.device)
    for w, kept in row_chunks(weight, mask):
        squares += w.masked_fill(kept, 0).square().sum()
    return squares


def _beside(part: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """A chunk on the device of another."""
    return part.to(other.device, non_blocking=True)

"""The steps of the method as pure functions on tensors (derived in docs/derivation.md)."""

import torch

from hf_admm.patterns import SparsityPattern
from hf_admm.projections import sparsity_mask, zero_outside


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
    # The difference first: in half precision, `strength * weight` would swallow a small gradient.
    gradient.add_(weight - anchor, alpha=strength)


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
    weight.lerp_(anchor.to(weight.dtype), step / (1 + step))


def dual_step(
    weight: torch.Tensor, anchor: torch.Tensor, pattern: SparsityPattern, transposed: bool, rescale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The Z-step and the U-step: v = W + U, Z = Pi(v), U = v - Z.

    Args:
        weight (`torch.Tensor`):
            W, of any floating-point dtype.
        anchor (`torch.Tensor`):
            T = Z - U as it was, in float32.
        pattern ([`SparsityPattern`]):
            The pattern.
        transposed (`bool`):
            Whether the input dimension comes first.
        rescale (`float`):
            `rho_old / rho_new`, at most 1: the dual variable is U times rho, and must not jump when rho grows.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: The new anchor, and a vector of the sums that residuals are made of:
        squares of W - Z, W, Z, Z - Z_old and U, then the entries whose mask flipped, and those kept.
    """
    weight = weight.float()
    old_mask = sparsity_mask(anchor, pattern, transposed)
    old_z = zero_outside(anchor.clone(), old_mask)
    v = weight + (old_z - anchor)
    mask = sparsity_mask(v, pattern, transposed)
    z = zero_outside(v.clone(), mask)
    u = v - z
    squares = [part.square().sum() for part in (weight - z, weight, z, z - old_z, u)]
    sums = torch.stack([*squares, (mask != old_mask).sum(), mask.sum()])
    return z.sub_(u, alpha=rescale), sums

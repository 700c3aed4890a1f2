"""
ADMM for N:M one layer at a time, before training, so that the layer's output changes least. There the loss is a
quadratic of the weights: ADMM's steps are exact, and its dual variable does its work. The method is that of ALPS (Meng
et al., 2024, arXiv 2406.07831), written for this file: scaled inputs, a penalty that grows until the mask rests,
conjugate gradients for what is kept.
"""

import torch

from hf_admm import sparsity_mask
from hf_admm.sparsity.patterns import NMPattern


DAMP = 0.01
_RHO, _GROWTH, _INTERVAL = 0.1, 1.1, 3
_MOST_STEPS = 600
_SOLVER_STEPS = 30


def prune(weight: torch.Tensor, hessian: torch.Tensor, kept: int, group: int, damp: float = DAMP) -> torch.Tensor:
    """
    Prunes a weight W to N:M so that `tr((W - W') H (W - W')^T)` is small, W' the pruned one.

    Args:
        weight (`torch.Tensor` of shape `(out_features, in_features)`):
            W; left as it is.
        hessian (`torch.Tensor` of shape `(in_features, in_features)`):
            H, see [`~calibration.Hessian`].
        kept (`int`), group (`int`):
            N and M.
        damp (`float`, *optional*, defaults to 0.01):
            Added to the diagonal, as a share of its mean.

    Returns:
        `torch.Tensor`: The pruned weight, in float32.

    Raises:
        `ValueError`: If the number of inputs is not a multiple of M.
    """
    pattern = NMPattern(kept, group)
    if misfit := pattern.misfit(*weight.shape):
        raise ValueError(f"A weight of shape {tuple(weight.shape)} can't be pruned to {pattern}: {misfit}.")
    hessian = hessian.float().clone()
    diagonal = hessian.diagonal()
    diagonal += damp * diagonal.mean()
    # In coordinates in which H has a diagonal of ones, where one rho fits every layer.
    scale = diagonal.rsqrt()
    hessian = hessian * scale[:, None] * scale
    start = weight.detach().float() / scale
    return _solve(start, hessian, _choose(start, hessian, pattern)) * scale


def _choose(start: torch.Tensor, hessian: torch.Tensor, pattern: NMPattern) -> torch.Tensor:
    """The mask that ADMM ends with."""
    values, vectors = torch.linalg.eigh(hessian)
    goal, rho = start @ hessian, _RHO
    mask = sparsity_mask(start, pattern)
    z, u = start * mask, torch.zeros_like(start)
    for step in range(1, _MOST_STEPS + 1):
        w = ((goal + rho * (z - u)) @ vectors / (values + rho)) @ vectors.T
        now = sparsity_mask(w + u, pattern)
        z = (w + u) * now
        u += w - z
        if step % _INTERVAL == 0:
            if torch.equal(now, mask):
                break
            mask = now
            rho *= _GROWTH
            u /= _GROWTH  # the multiplier itself, rho * u, stays
    return now


def _solve(start: torch.Tensor, hessian: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The best entries within the mask, by conjugate gradients in all rows at once."""
    found = start * mask
    residual = (start - found) @ hessian * mask
    direction, size = residual, residual.square().sum(1, keepdim=True)
    for _ in range(_SOLVER_STEPS):
        image = direction @ hessian * mask
        step = size / (direction * image).sum(1, keepdim=True).clamp_min(1e-30)
        found = found + step * direction
        residual = residual - step * image
        before, size = size, residual.square().sum(1, keepdim=True)
        direction = residual + size / before.clamp_min(1e-30) * direction
    return found

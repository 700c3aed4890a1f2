"""ADMM on one layer: what a pattern changes of the layer's output is to be least (docs/one_shot.md).

There the loss is a quadratic of the weights, so that ADMM's steps are exact and its dual variable does its work. The
method is that of ALPS (Meng et al., 2024, arXiv 2406.07831), written for this file: inputs scaled to one size, a rho
that grows until the mask rests, conjugate gradients for what is kept.
"""

import torch

from hf_admm.sparsity.patterns import SparsityPattern
from hf_admm.sparsity.projections import sparsity_mask


DAMP = 0.01
# In inputs of mean square one, the same for every layer.
_RHO, _GROWTH, _INTERVAL = 0.1, 1.1, 3
_MOST_STEPS = 600
_SOLVER_STEPS = 30
_SILENT = 1e-6


def prune_layer(
    weight: torch.Tensor, moments: torch.Tensor, pattern: SparsityPattern, damp: float = DAMP
) -> torch.Tensor:
    """
    Prunes a weight W to W' so that `tr((W - W') H (W - W')^T)` is small, H being the second moments of the inputs.

    Args:
        weight (`torch.Tensor` of shape `(out_features, in_features)`):
            W, left as it is.
        moments (`torch.Tensor` of shape `(in_features, in_features)`):
            H, the mean of `x x^T` over inputs x.
        pattern ([`SparsityPattern`]):
            What W' obeys.
        damp (`float`, *optional*, defaults to 0.01):
            Added to the diagonal of H, as a share of its mean.

    Returns:
        `torch.Tensor` of the shape of `weight`: W', in float32.

    Raises:
        `ValueError`: If the pattern does not fit the shape.
    """
    moments = moments.float().clone()
    diagonal = moments.diagonal()
    if not diagonal.any():  # inputs of nothing but zeros: every mask is as good as another
        return weight.detach().float() * sparsity_mask(weight, pattern)
    silent = diagonal == 0
    diagonal += damp * diagonal.mean()
    scale = diagonal.rsqrt()
    moments = moments * scale[:, None] * scale
    start = weight.detach().float() / scale
    # What multiplies an input that is always zero costs nothing: it goes first, the small ones before the large ones.
    mask = _choose(torch.where(silent, _SILENT * start, start), moments, pattern)
    return _solve(start, moments, mask) * scale


def output_error(weight: torch.Tensor, pruned: torch.Tensor, moments: torch.Tensor) -> float:
    """`||(W - W') X|| / ||W X||`: how much of the layer's output over these inputs is changed."""
    weight, moments = weight.detach().float(), moments.float()
    change = weight - pruned.detach().float()
    whole = (weight @ moments * weight).sum()
    return ((change @ moments * change).sum() / whole).clamp_min(0).sqrt().item() if whole > 0 else 0.0


def _choose(start: torch.Tensor, moments: torch.Tensor, pattern: SparsityPattern) -> torch.Tensor:
    """The mask that ADMM ends with."""
    values, vectors = torch.linalg.eigh(moments)
    goal, rho = start @ moments, _RHO
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


def _solve(start: torch.Tensor, moments: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The best entries within the mask, by conjugate gradients in all rows at once."""
    found = start * mask
    residual = (start - found) @ moments * mask
    direction, size = residual, residual.square().sum(1, keepdim=True)
    for _ in range(_SOLVER_STEPS):
        image = direction @ moments * mask
        step = size / (direction * image).sum(1, keepdim=True).clamp_min(1e-30)
        found = found + step * direction
        residual = residual - step * image
        before, size = size, residual.square().sum(1, keepdim=True)
        direction = residual + size / before.clamp_min(1e-30) * direction
    return found

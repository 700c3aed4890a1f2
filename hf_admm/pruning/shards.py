"""Weights that FSDP2 has divided among processes, each of which holds some of their rows.

The state of a run lives beside the weights, as plain tensors of the local shape. N:M groups lie within a row and most
blocks within the rows of one process, so nearly everything is local. What is not (a density, a block or a group of a
transposed weight that straddles two shards, and files) gathers one weight at a time.
"""

import math
from collections.abc import Mapping

import torch
from torch import distributed, nn

from hf_admm.sparsity.patterns import BlockPattern, NMPattern, OwnPattern, SparsityPattern


if distributed.is_available():
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
else:  # some builds of torch: nothing is an instance of these
    DTensor = FSDPModule = Partial = Replicate = Shard = ()


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that this process holds, sharing its memory: all of it if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gather(part: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """
    The whole of a tensor whose parts lie as those of a weight do. Every process must call it.

    Args:
        part (`torch.Tensor`):
            This process's part, of the shape of `local(weight)`, on any device.
        weight (`torch.Tensor`):
            The weight.

    Returns:
        `torch.Tensor` of the shape of `weight`; `part` itself if it is not sharded.
    """
    if not isinstance(weight, DTensor):
        return part
    shape, stride = weight.shape, weight.stride()
    part = part.to(local(weight).device)  # what talks to the other processes may know no other device
    return DTensor.from_local(
        part, weight.device_mesh, weight.placements, run_check=False, shape=shape, stride=stride
    ).full_tensor()


def scatter(whole: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The inverse of [`gather`]: this process's part of a tensor that every process holds. Needs no communication."""
    if not isinstance(weight, DTensor):
        return whole
    mesh = weight.device_mesh
    replicated = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return replicated.redistribute(mesh, weight.placements).to_local()


def straddles(weight: torch.Tensor, pattern: SparsityPattern, transposed: bool) -> bool:
    """Whether a group of the pattern may have entries in the parts of two processes."""
    if not isinstance(weight, DTensor):
        return False
    if isinstance(pattern, OwnPattern):  # each entry by itself
        return False
    extents = {0: weight.shape[0], 1: weight.shape[1]}  # of a group, in entries along each dimension
    if isinstance(pattern, NMPattern):
        extents = {0: 1, 1: pattern.group_size}
    elif isinstance(pattern, BlockPattern):
        extents = {0: pattern.rows, 1: pattern.columns}
    if transposed:
        extents = {0: extents[1], 1: extents[0]}
    mesh, seen = weight.device_mesh, set()
    for axis, placement in enumerate(weight.placements):
        if isinstance(placement, Replicate) or mesh.size(axis) == 1:
            continue
        if type(placement) is not Shard or placement.dim in seen:  # FSDP over tensor parallelism: no plain chunks
            return True
        seen.add(placement.dim)
        chunk = -(-weight.shape[placement.dim] // mesh.size(axis))  # as torch.chunk divides
        if chunk % extents[placement.dim]:
            return True
    return False


def shard_count(weight: torch.Tensor) -> int:
    """Into how many parts a weight is divided."""
    if not isinstance(weight, DTensor):
        return 1
    axes = [axis for axis, placement in enumerate(weight.placements) if isinstance(placement, Shard)]
    return math.prod(weight.device_mesh.size(axis) for axis in axes)


def total(sums: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """
    Adds up sums over weights and, where these are sharded, over processes. Every process must call it.

    Args:
        sums (`Mapping[str, torch.Tensor]`):
            For each weight, sums over this process's part, all of one shape.
        weights (`Mapping[str, torch.Tensor]`):
            The weights.

    Returns:
        `torch.Tensor`: The totals, in double precision.
    """
    layouts = {}
    for name, value in sums.items():
        weight = weights[name]
        key = (weight.device_mesh, weight.placements) if isinstance(weight, DTensor) else None
        layouts.setdefault(key, []).append(value.double())
    totals = []
    for key, values in layouts.items():
        value = torch.stack(values).sum(dim=0)
        if key is not None:
            mesh, placements = key
            parts = [Partial() if isinstance(placement, Shard) else Replicate() for placement in placements]
            value = DTensor.from_local(value, mesh, parts, run_check=False).full_tensor()
        totals.append(value)
    return torch.stack(totals).sum(dim=0)


def reshard(model: nn.Module) -> None:
    """Frees the gathered copies of the weights that FSDP2 keeps after some forward passes: they would be stale."""
    if isinstance(model, FSDPModule):  # as the outermost module then always is
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

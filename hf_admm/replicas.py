"""Do all processes hold the same bits? With DDP, a mask that differs on one of them makes the replicas drift apart."""

from collections.abc import Mapping

import torch
from torch import distributed


def check_replicas(tensors: Mapping[str, torch.Tensor]) -> None:
    """
    Compares tensors among all processes by a digest of their bits. Every process must call it; one alone does nothing.

    Args:
        tensors (`Mapping[str, torch.Tensor]`):
            Matrices that should be the same everywhere.

    Raises:
        `RuntimeError`: On every process, if one differs anywhere; the message names them all.
    """
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return
    if not tensors:
        return
    mine = torch.stack([digest(tensor) for tensor in tensors.values()])
    everyone = [torch.empty_like(mine) for _ in range(distributed.get_world_size())]
    distributed.all_gather(everyone, mine)
    differs = (torch.stack(everyone) != everyone[0]).any(dim=0)
    if differs.any():
        names = [name for name, bad in zip(tensors, differs.tolist(), strict=True) if bad]
        raise RuntimeError(
            f"The processes no longer hold the same values of: {', '.join(names)}. Something changes the weights on "
            "one process only, such as a callback, a hook, or an operation that gives different results on different "
            "devices. Resume from the last checkpoint once it is removed."
        )


def digest(matrix: torch.Tensor) -> torch.Tensor:
    """An integer that depends on every bit of a matrix and on its place, the same on every device."""
    bits = matrix.detach().contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[
        matrix.element_size()
    ])  # fmt: skip
    # Sums of integers do not depend on their order, as sums of floats do.
    sums = [bits.sum(dim=dim, dtype=torch.int64) for dim in (0, 1)]
    odd = [2 * torch.arange(len(part), device=part.device) + 1 for part in sums]
    return (sums[0] * odd[0]).sum() * 31 + (sums[1] * odd[1]).sum()

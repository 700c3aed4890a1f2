"""Do all processes hold the same bits? With DDP, a mask that differs on one of them makes the replicas drift apart."""

from collections.abc import Mapping

import torch
from torch import distributed

from hf_admm.sparsity.selection import SAME_SIZE_INTEGER


_CHUNK = 1024


def check_replicas(tensors: Mapping[str, torch.Tensor]) -> None:
    """
    Compares tensors among all processes by a digest of their bits. Every process must call it; one alone does nothing.

    Args:
        tensors (`Mapping[str, torch.Tensor]`):
            Matrices or vectors that should be the same everywhere, the first of them where processes talk.

    Raises:
        `RuntimeError`: On every process, if one differs anywhere; the message names them all.
    """
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return
    if not tensors:
        return
    device = next(iter(tensors.values())).device
    mine = torch.stack([digest(tensor).to(device) for tensor in tensors.values()])
    everyone = [torch.empty_like(mine) for _ in range(distributed.get_world_size())]
    distributed.all_gather(everyone, mine)
    differs = (torch.stack(everyone) != everyone[0]).any(dim=0)
    if differs.any():
        names = [name for name, bad in zip(tensors, differs.tolist(), strict=True) if bad]
        raise RuntimeError(
            f"The processes no longer hold the same values of: {', '.join(names)}. Something changes the weights on "
            "one process only, such as a callback, a hook, an operation that gives different results on different "
            "devices, or an evaluate() before train(), after which Trainer leaves DDP out: train with a new trainer "
            "then. Resume from the last checkpoint once it is removed."
        )


def digest(matrix: torch.Tensor) -> torch.Tensor:
    """An integer that any change of bits is all but certain to change, the same on every device."""
    matrix = matrix.detach().contiguous()
    matrix = matrix if matrix.dim() == 2 else matrix.view(1, -1)  # a packed mask
    bits = matrix.view(torch.uint8 if matrix.element_size() == 1 else SAME_SIZE_INTEGER[matrix.element_size()])
    # Each entry times a factor of its row and one of its column. Sums of integers do not depend on their order, as
    # sums of floats do; they wrap around, which harms nothing.
    rows, columns = (_factors(length, dim, bits.device) for dim, length in enumerate(bits.shape))
    total = torch.zeros_like(columns)
    for part, factors in zip(bits.split(_CHUNK), rows.split(_CHUNK), strict=True):  # for the memory
        total += (part.long() * factors[:, None]).sum(dim=0)
    return (total * columns).sum()


def _factors(length: int, dim: int, device: torch.device) -> torch.Tensor:
    """Odd pseudo-random integers, by a multiplicative hash of the position, others for rows than for columns."""
    factors = (torch.arange(1, length + 1, device=device) + (dim << 40)) * 0x1E3779B97F4A7C15
    return ((factors ^ (factors >> 29)) * 0x3F58476D1CE4E5B9) | 1

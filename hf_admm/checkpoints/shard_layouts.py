"""How what lies beside a weight is divided in files: as the weight is, and masks in rows of whole bytes."""

import math

import torch

from hf_admm.pruning.shards import DTensor, Replicate, Shard, local, scatter
from hf_admm.sparsity.masks import unpack_mask


def spread(part: torch.Tensor, weight: torch.Tensor, shape: torch.Size | None = None) -> torch.Tensor:
    """
    The whole tensor that this process's part belongs to, of which it holds that part alone. Needs no communication.

    Args:
        part (`torch.Tensor`):
            The part, on any device, where it stays.
        weight (`torch.Tensor`):
            The weight that the tensor is divided as.
        shape (`torch.Size`, *optional*):
            The shape of the whole; that of the weight by default.

    Returns:
        `DTensor`, or `part` itself if the weight is not sharded.
    """
    if not isinstance(weight, DTensor):
        return part
    shape = torch.Size(weight.shape if shape is None else shape)
    stride = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    outline = DTensor.from_local(
        part.to("meta"), weight.device_mesh, weight.placements, run_check=False, shape=shape, stride=stride
    )
    # As FSDP2 makes its own. `from_local` would move to the GPU, all at once, what is kept in CPU memory.
    return DTensor(part, outline._spec, requires_grad=False)


def empty_like_part(weight: torch.Tensor, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """
    Room in CPU memory for what is read from files.

    Args:
        weight (`torch.Tensor`):
            The weight that the tensor belongs to.
        shape (`torch.Size`), dtype (`torch.dtype`):
            Of the whole, as it is in the files.

    Returns:
        `torch.Tensor`: What [`spread`] would give of this process's part; the whole, where rows are not what divides
        the weight and what is read has rows of its own.
    """
    part = local(weight)
    if shape == weight.shape:
        return spread(torch.empty(part.shape, dtype=dtype), weight)
    if not _by_rows(weight):
        return torch.empty(shape, dtype=dtype)
    return spread(torch.empty((part.shape[0], *shape[1:]), dtype=dtype), weight, shape)


def rows_of_mask(shape: torch.Size) -> list[int] | None:
    """The shape of the packed mask of a weight whose rows take whole bytes, `None` for other weights."""
    entries = math.prod(shape[1:])
    return [shape[0], entries // 8] if entries % 8 == 0 else None


def mask_to_rows(packed: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A mask for files: a bit an entry where rows are divided and take whole bytes, else a byte an entry."""
    rows, part = rows_of_mask(weight.shape), local(weight)
    if rows is None or not _by_rows(weight):
        return spread(unpack_mask(packed, part.shape), weight)
    return spread(packed.view(part.shape[0], rows[1]), weight, torch.Size(rows))


def mask_from_rows(found: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The inverse of [`mask_to_rows`]: this process's part of the mask, as truth values."""
    if found.dtype == torch.bool:
        return found
    if _by_rows(weight):
        return unpack_mask(found.contiguous().view(-1), local(weight).shape)
    return scatter(unpack_mask(found.view(-1), weight.shape).to(local(weight).device), weight).cpu()


def _by_rows(weight: torch.Tensor) -> bool:
    """Whether each process holds whole rows of a weight, one after another."""
    if not isinstance(weight, DTensor):
        return True
    divided = [placement for placement in weight.placements if not isinstance(placement, Replicate)]
    return len(divided) <= 1 and all(type(placement) is Shard and placement.dim == 0 for placement in divided)

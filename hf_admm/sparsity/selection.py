"""Which entries of each group are the largest: the kernels of the projections.

They work on keys, integers that order the entries by magnitude, and break ties by position: the first entry of a group
wins. What costs time is memory traffic, and loops that the processor can't vectorise. So callers hand over a weight in
chunks that stay in the cache, wins are counted in single bytes, and on a CPU NumPy compares: torch's comparisons that
write booleans are not vectorised there.
"""

import functools
import threading
from collections.abc import Iterator

import numpy as np
import torch

from hf_admm.sparsity.chunks import chunk_size


# Beyond this group size, finding the threshold of each group is faster than comparing its entries with each other.
WIDEST_COMPARED = 64
# Comparing where the entries lie costs M - 1 comparisons an entry; laid out by columns half of them, and the layout.
WIDEST_IN_PLACE = 32

# Of a large group, the threshold lies between two values of a sample nearly always, and few entries do.
_SAMPLE = 1 << 16

SAME_SIZE_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def magnitude_keys(tensor: torch.Tensor) -> torch.Tensor:
    """
    Integers that order the entries of a tensor by magnitude, comparable within that tensor alone.

    The bits of an IEEE number without its sign grow with its magnitude, so comparing them as integers is exact in
    every dtype and total: infinities come above finite numbers and NaN above infinities, where comparisons of floats
    with NaN would all be false and a group would keep too many entries.

    Args:
        tensor (`torch.Tensor`):
            Any real tensor.

    Returns:
        `torch.Tensor`: Integers of the same shape.

    Raises:
        `ValueError`: If the tensor is complex.
    """
    if tensor.is_complex():
        raise ValueError(f"Magnitudes are compared for real tensors only, got dtype {tensor.dtype}.")
    if not tensor.is_floating_point():
        integers = tensor.long()
        return torch.where(integers < 0, ~integers, integers - 1)  # |x| - 1: the lowest int64 has no |x|
    integer = SAME_SIZE_INTEGER[tensor.element_size()]
    return tensor.contiguous().view(integer) & torch.iinfo(integer).max


class _Scratch(threading.local):
    """Buffers of each thread that outlive a call: memory fresh from the system costs more than the work done in it."""

    def __init__(self):
        self.buffers = {}

    def get(self, name: str, length: int, dtype: type) -> np.ndarray:
        buffer = self.buffers.get((name, dtype))
        if buffer is None or len(buffer) < length:
            buffer = self.buffers[name, dtype] = np.empty(length, dtype)
        return buffer[:length]


_scratch = _Scratch()


def largest_in_rows(values: torch.Tensor, group_size: int, kept: int, mask: torch.Tensor) -> None:
    """
    Selects in groups of consecutive entries, where they lie: each entry meets the one `s` behind it, for `s` from 1 to
    `group_size - 1`, and what crosses into the next group is struck out.

    Args:
        values (`torch.Tensor` of shape `(groups * group_size,)`):
            Values, not keys, contiguous and on a CPU.
        group_size (`int`):
            Entries in a group, at most 127.
        kept (`int`):
            How many to select in each.
        mask (`torch.BoolTensor` of the shape of `values`):
            Where the selection is written.
    """
    length = len(values)
    if values.is_floating_point():
        bits = values.view(SAME_SIZE_INTEGER[values.element_size()]).numpy()
        keys = np.bitwise_and(bits, np.iinfo(bits.dtype).max, out=_scratch.get("keys", length, bits.dtype.type))
    else:
        keys = magnitude_keys(values).numpy()
    inside, place = _group_layout(group_size, max(length, chunk_size(values.device)))
    wins, earlier_wins = _scratch.get("wins", length, np.int8), _scratch.get("earlier wins", length, np.bool_)
    wins[:] = place[:length]  # against those before it, less what it loses to them below
    for shift in range(1, group_size):
        won = np.greater_equal(keys[:-shift], keys[shift:], out=earlier_wins[:-shift])
        won &= inside[shift - 1][: len(won)]
        wins[:-shift] += won.view(np.int8)
        wins[shift:] -= won.view(np.int8)
    np.greater_equal(wins, group_size - kept, out=mask.numpy())


@functools.lru_cache(maxsize=8)
def _group_layout(group_size: int, length: int) -> tuple[list[np.ndarray], np.ndarray]:
    """For each shift, whether an entry shares its group with the one so far behind it; and its place in its group."""
    place = np.arange(group_size, dtype=np.int8)
    repeats = -(-length // group_size)
    return [np.tile(place + shift < group_size, repeats) for shift in range(1, group_size)], np.tile(place, repeats)


def largest_in_columns(keys: torch.Tensor, kept: int) -> torch.Tensor:
    """
    Selects in groups that are columns: the entry in row `i` of every group meets the one in row `i + s` at once.

    Args:
        keys (`torch.Tensor` of shape `(group_size, groups)`):
            Integers, contiguous; `group_size` is at most 127.
        kept (`int`):
            How many to select in each column.

    Returns:
        `torch.BoolTensor` of the shape of `keys`.
    """
    size = len(keys)
    wins = torch.arange(size, dtype=torch.int8, device=keys.device)[:, None].repeat(1, keys.shape[1])
    compare = _compare_on_cpu if keys.device.type == "cpu" else torch.ge
    for shift in range(1, size):
        won = compare(keys[:-shift], keys[shift:]).view(torch.int8)
        wins[:-shift].add_(won)
        wins[shift:].sub_(won)
    return _compare_on_cpu(wins, size - kept) if wins.device.type == "cpu" else wins >= size - kept


def _compare_on_cpu(one: torch.Tensor, other: torch.Tensor | int) -> torch.Tensor:
    """`one >= other`."""
    return torch.from_numpy(one.numpy() >= (other.numpy() if isinstance(other, torch.Tensor) else other))


def largest_by_threshold(groups: torch.Tensor, kept: int) -> torch.Tensor:
    """
    Selects in wide groups: the entries above the `kept`-th largest, then the first ones equal to it.

    Args:
        groups (`torch.Tensor` of shape `(groups, group_size)`):
            Values, not keys.
        kept (`int`):
            How many to select in each row.

    Returns:
        `torch.BoolTensor` of the shape of `groups`.
    """
    if len(groups) == 1 and groups.device.type == "cpu" and groups.numel() > 4 * _SAMPLE:
        return _largest_of_all(groups.reshape(-1), kept).view(groups.shape)
    keys = magnitude_keys(groups)
    threshold = keys.kthvalue(keys.shape[1] - kept + 1, dim=1, keepdim=True).values
    above, equal = keys > threshold, keys == threshold
    missing = kept - above.sum(dim=1, keepdim=True)
    return above | (equal & (equal.cumsum(dim=1) <= missing))


def _largest_of_all(values: torch.Tensor, kept: int) -> torch.Tensor:
    """One group: a bracket from a sample tells most entries from the threshold, and only the others are searched."""
    size = values.numel()
    sample = magnitude_keys(values[:: size // _SAMPLE | 1]).sort().values  # an odd stride: rarely in step with rows
    rank, margin = len(sample) - len(sample) * kept // size, 4 * int(len(sample) ** 0.5)
    low, high = (sample[min(max(at, 0), len(sample) - 1)] for at in (rank - margin, rank + margin))
    mask, between = torch.empty_like(values, dtype=torch.bool), []
    for keys, flags in _key_chunks(values, mask):
        np.greater(keys.numpy(), high.item(), out=flags.numpy())
        reach = torch.from_numpy(keys.numpy() >= low.item())
        between.append(keys[reach.logical_xor_(flags)])
    candidates, missing = torch.cat(between), kept - int(mask.count_nonzero())
    if not 0 < missing <= candidates.numel():  # an unlucky sample
        candidates, missing = magnitude_keys(values), kept
    threshold = candidates.kthvalue(candidates.numel() - missing + 1).values
    missing -= int((candidates > threshold).sum())
    ties = int((candidates == threshold).sum())
    for keys, flags in _key_chunks(values, mask):
        np.greater_equal(keys.numpy(), threshold.item(), out=flags.numpy())
    if ties > missing:
        mask[(magnitude_keys(values) == threshold).nonzero().view(-1)[missing:]] = False
    return mask


def _key_chunks(values: torch.Tensor, flags: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    chunk = chunk_size(values.device)
    for part, out in zip(values.split(chunk), flags.split(chunk), strict=True):
        yield magnitude_keys(part), out

"""Which entries of each group are the largest: the kernels of the projections.

They work on keys, integers that order the entries by magnitude, and break ties by position: the first entry of a group
wins. What costs time is memory traffic, and loops that the processor can't vectorise. So callers hand over a weight in
chunks that stay in the cache; a comparison writes integers of the keys' own type, since those of torch that write
booleans are not vectorised; and the wins of an entry are counted in single bytes.
"""

import functools
from collections.abc import Iterator

import torch

from hf_admm.chunks import chunk_size


# Beyond this group size, finding the threshold of each group is faster than comparing its entries with each other.
WIDEST_COMPARED = 64
# Comparing where the entries lie costs M - 1 comparisons an entry; laid out by columns half of them, and the layout.
WIDEST_IN_PLACE = 8

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


def largest_in_rows(keys: torch.Tensor, group_size: int, kept: int) -> torch.Tensor:
    """
    Selects in groups of consecutive entries, where they lie: each entry meets the one `s` behind it, for `s` from 1 to
    `group_size - 1`, and what crosses into the next group is struck out.

    Args:
        keys (`torch.Tensor` of shape `(groups * group_size,)`):
            Integers, contiguous.
        group_size (`int`):
            Entries in a group, at most 127.
        kept (`int`):
            How many to select in each.

    Returns:
        `torch.BoolTensor` of the shape of `keys`.
    """
    inside, place = _group_layout(group_size, max(len(keys), chunk_size(keys.device)), keys.device)
    wins = place[: len(keys)].clone()  # against those before it, less what it loses to them below
    earlier_wins, won = torch.empty_like(keys), torch.empty_like(wins)
    for shift in range(1, group_size):
        pairs = len(keys) - shift
        torch.ge(keys[:-shift], keys[shift:], out=earlier_wins[:pairs])
        won[:pairs].copy_(earlier_wins[:pairs]).bitwise_and_(inside[shift - 1][:pairs])
        wins[:-shift].add_(won[:pairs])
        wins[shift:].sub_(won[:pairs])
    return wins.ge_(group_size - kept).view(torch.bool)


@functools.lru_cache(maxsize=8)
def _group_layout(group_size: int, length: int, device: torch.device) -> tuple[list[torch.Tensor], torch.Tensor]:
    """For each shift, 1 where an entry shares its group with the one so far behind it; and its place in its group."""
    place = torch.arange(group_size, dtype=torch.int8, device=device)
    repeats = -(-length // group_size)
    inside = [(place + shift < group_size).to(torch.int8).repeat(repeats) for shift in range(1, group_size)]
    return inside, place.repeat(repeats)


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
    earlier_wins, won = torch.empty_like(keys), torch.empty_like(wins)
    for shift in range(1, size):
        pairs = size - shift
        torch.ge(keys[:-shift], keys[shift:], out=earlier_wins[:pairs])
        won[:pairs].copy_(earlier_wins[:pairs])
        wins[:-shift].add_(won[:pairs])
        wins[shift:].sub_(won[:pairs])
    return wins.ge_(size - kept).view(torch.bool)


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
    mask, between = torch.empty_like(values, dtype=torch.int8), []
    for keys, flags in _key_chunks(values, mask):
        flags.copy_(torch.gt(keys, high, out=torch.empty_like(keys)))
        reach = torch.ge(keys, low, out=torch.empty_like(keys)).to(torch.int8)
        between.append(keys[reach.sub_(flags).view(torch.bool)])
    candidates, missing = torch.cat(between), kept - int(mask.count_nonzero())
    if not 0 < missing <= candidates.numel():  # an unlucky sample
        candidates, missing = magnitude_keys(values), kept
    threshold = candidates.kthvalue(candidates.numel() - missing + 1).values
    missing -= int((candidates > threshold).sum())
    ties = int((candidates == threshold).sum())
    for keys, flags in _key_chunks(values, mask):
        flags.copy_(torch.ge(keys, threshold, out=torch.empty_like(keys)))
    mask = mask.view(torch.bool)
    if ties > missing:
        mask[(magnitude_keys(values) == threshold).nonzero().view(-1)[missing:]] = False
    return mask


def _key_chunks(values: torch.Tensor, flags: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    chunk = chunk_size(values.device)
    for part, out in zip(values.split(chunk), flags.split(chunk), strict=True):
        yield magnitude_keys(part), out

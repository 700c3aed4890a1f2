"""Projections on the set of weights that obey a pattern: pure functions on tensors.

The set is not convex, yet its Euclidean projection is exact: keep the largest magnitudes of each group, zero the rest.
Every function takes a weight as `(out_features, in_features)`; pass `transposed=True` for a weight stored the other
way round, as GPT-2's `Conv1D` does. Ties are broken by position (the first entry of a group wins), so a mask keeps
exactly as many entries as the pattern says and is the same on every device and every process.

Values that are no numbers have a defined place: infinities count as larger than every number, and NaN as larger still.
So a mask keeps as many entries as ever, and a NaN in a weight is kept rather than hidden by a zero.
"""

import torch

from hf_admm.patterns import BlockPattern, DensityPattern, NMPattern, SparsityPattern


# A comparison network needs M*(M-1)/2 passes over the weight; beyond this group size a selection is faster.
_LARGEST_NETWORK = 8

_SAME_SIZE_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


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
    integer = _SAME_SIZE_INTEGER[tensor.element_size()]
    return tensor.contiguous().view(integer) & torch.iinfo(integer).max


def to_groups(tensor: torch.Tensor, pattern: SparsityPattern, transposed: bool = False) -> torch.Tensor:
    """
    Lays out a weight by groups.

    Args:
        tensor (`torch.Tensor` of shape `(out_features, in_features)`):
            The weight, or `(in_features, out_features)` if `transposed`.
        pattern ([`SparsityPattern`]):
            The pattern.
        transposed (`bool`, *optional*, defaults to `False`):
            Whether the input dimension comes first.

    Returns:
        `torch.Tensor` of shape `(groups, group_size)`.

    Raises:
        `ValueError`: If the tensor is not a matrix or the pattern does not fit its shape.
    """
    if tensor.dim() != 2:
        raise ValueError(f"A pattern divides a matrix into groups, got a tensor of shape {tuple(tensor.shape)}.")
    matrix = tensor.t() if transposed else tensor
    if reason := pattern.misfit(*matrix.shape):
        raise ValueError(f"Pattern {pattern} does not fit a weight of shape {tuple(matrix.shape)}: {reason}.")
    if isinstance(pattern, NMPattern):
        return matrix.reshape(-1, pattern.group_size)
    if isinstance(pattern, BlockPattern):
        rows, columns = matrix.shape
        blocks = matrix.reshape(rows // pattern.rows, pattern.rows, columns // pattern.columns, pattern.columns)
        return blocks.transpose(1, 2).reshape(-1, pattern.group_size)
    return matrix.reshape(1, -1)


def from_groups(
    groups: torch.Tensor, pattern: SparsityPattern, shape: torch.Size, transposed: bool = False
) -> torch.Tensor:
    """The inverse of [`to_groups`]: a tensor of `shape`, as the weight is stored."""
    rows, columns = reversed(shape) if transposed else shape
    if isinstance(pattern, BlockPattern):
        blocks = groups.reshape(rows // pattern.rows, columns // pattern.columns, pattern.rows, pattern.columns)
        groups = blocks.transpose(1, 2)
    matrix = groups.reshape(rows, columns)
    return matrix.t().contiguous() if transposed else matrix


def kept_per_group(pattern: SparsityPattern, group_size: int) -> int:
    """How many entries of a group of that size the pattern keeps."""
    return pattern.kept_of(group_size) if isinstance(pattern, DensityPattern) else pattern.kept


def sparsity_mask(tensor: torch.Tensor, pattern: SparsityPattern, transposed: bool = False) -> torch.Tensor:
    """
    The entries that the projection on the pattern keeps: the largest magnitudes of each group, exactly as many as the
    pattern says, also under ties, in groups of zeros, and with infinities (above numbers) and NaN (above infinities).

    Args:
        tensor (`torch.Tensor` of shape `(out_features, in_features)`):
            The weight, or `(in_features, out_features)` if `transposed`.
        pattern ([`SparsityPattern`]):
            The pattern.
        transposed (`bool`, *optional*, defaults to `False`):
            Whether the input dimension comes first.

    Returns:
        `torch.BoolTensor` of the shape of `tensor`: `True` where an entry is kept.

    Raises:
        `ValueError`: If the pattern does not fit the shape.
    """
    keys = to_groups(magnitude_keys(tensor.detach()), pattern, transposed)
    if not keys.numel():
        return torch.zeros_like(tensor, dtype=torch.bool)
    kept = kept_per_group(pattern, keys.shape[1])
    select = _mask_by_comparisons if keys.shape[1] <= _LARGEST_NETWORK else _mask_by_threshold
    return from_groups(select(keys, kept), pattern, tensor.shape, transposed)


def _mask_by_comparisons(keys: torch.Tensor, kept: int) -> torch.Tensor:
    """Ranks each entry by comparing it with every other one of its group; keeps the ranks below `kept`."""
    columns = keys.unbind(-1)
    ranks = [torch.zeros(keys.shape[0], dtype=torch.int8, device=keys.device) for _ in columns]
    for later in range(len(columns)):
        for earlier in range(later):
            earlier_wins = columns[earlier] >= columns[later]
            ranks[later] += earlier_wins
            ranks[earlier] += ~earlier_wins
    return torch.stack([rank < kept for rank in ranks], dim=-1)


def _mask_by_threshold(keys: torch.Tensor, kept: int) -> torch.Tensor:
    """Keeps the entries above the `kept`-th largest, then fills up with the first ones equal to it."""
    threshold = keys.kthvalue(keys.shape[1] - kept + 1, dim=1, keepdim=True).values
    above, equal = keys > threshold, keys == threshold
    missing = kept - above.sum(dim=1, keepdim=True)
    return above | (equal & (equal.cumsum(dim=1) <= missing))


def project(tensor: torch.Tensor, pattern: SparsityPattern, transposed: bool = False) -> torch.Tensor:
    """
    The Euclidean projection of a weight on the pattern.

    Args:
        tensor (`torch.Tensor` of shape `(out_features, in_features)`):
            The weight, or `(in_features, out_features)` if `transposed`.
        pattern ([`SparsityPattern`]):
            The pattern.
        transposed (`bool`, *optional*, defaults to `False`):
            Whether the input dimension comes first.

    Returns:
        `torch.Tensor` of the shape and dtype of `tensor`, the nearest one that obeys the pattern. Distance has no
        meaning under NaN and infinities: there it is what [`sparsity_mask`] keeps.

    Raises:
        `ValueError`: If the pattern does not fit the shape.
    """
    return zero_outside(tensor.detach().clone(), sparsity_mask(tensor, pattern, transposed))


def zero_outside(tensor: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Zeroes the entries outside the mask, in place. A product would leave NaN and -0.0 behind."""
    return tensor.masked_fill_(~mask, 0)


def broken_groups(tensor: torch.Tensor, pattern: SparsityPattern, transposed: bool = False) -> torch.Tensor:
    """
    The groups that hold more non-zero entries than the pattern allows.

    Args:
        tensor (`torch.Tensor` of shape `(out_features, in_features)`):
            The weight, or `(in_features, out_features)` if `transposed`.
        pattern ([`SparsityPattern`]):
            The pattern.
        transposed (`bool`, *optional*, defaults to `False`):
            Whether the input dimension comes first.

    Returns:
        `torch.BoolTensor` of shape `(groups,)`.

    Raises:
        `ValueError`: If the pattern does not fit the shape.
    """
    groups = to_groups(tensor.detach(), pattern, transposed)
    return (groups != 0).sum(dim=1) > kept_per_group(pattern, groups.shape[1])

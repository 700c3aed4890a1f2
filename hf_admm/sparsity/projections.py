"""Projections on the set of weights that obey a pattern: pure functions on tensors.

The set is not convex, yet its Euclidean projection is exact: keep the largest magnitudes of each group, zero the rest.
Every function takes a weight as `(out_features, in_features)`; pass `transposed=True` for a weight stored the other
way round, as GPT-2's `Conv1D` does. Ties are broken by position (the first entry of a group wins), so a mask keeps
exactly as many entries as the pattern says and is the same on every device and every process.

Values that are no numbers have a defined place: infinities count as larger than every number, and NaN as larger still.
So a mask keeps as many entries as ever, and a NaN in a weight is kept rather than hidden by a zero.
"""

import torch

from hf_admm.sparsity.chunks import row_chunks
from hf_admm.sparsity.patterns import BlockPattern, DensityPattern, NMPattern, OwnPattern, SparsityPattern
from hf_admm.sparsity.selection import (
    SAME_SIZE_INTEGER,
    WIDEST_COMPARED,
    WIDEST_IN_PLACE,
    largest_by_threshold,
    largest_in_columns,
    largest_in_rows,
    magnitude_keys,
)


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
    _check_fit(tensor, pattern, transposed)
    matrix = tensor.t() if transposed else tensor
    if isinstance(pattern, NMPattern):
        return matrix.reshape(-1, pattern.group_size)
    if isinstance(pattern, BlockPattern):
        rows, columns = matrix.shape
        blocks = matrix.reshape(rows // pattern.rows, pattern.rows, columns // pattern.columns, pattern.columns)
        return blocks.transpose(1, 2).reshape(-1, pattern.group_size)
    return matrix.reshape(1, -1)


def _check_fit(tensor: torch.Tensor, pattern: SparsityPattern, transposed: bool) -> None:
    if isinstance(pattern, OwnPattern):
        raise ValueError("Pattern own has no groups: compare the zeros of a weight with those of the weight it was.")
    if tensor.dim() != 2:
        raise ValueError(f"A pattern divides a matrix into groups, got a tensor of shape {tuple(tensor.shape)}.")
    shape = tuple(reversed(tensor.shape)) if transposed else tuple(tensor.shape)
    if reason := pattern.misfit(*shape):
        raise ValueError(f"Pattern {pattern} does not fit a weight of shape {shape}: {reason}.")


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


def kept_range(mask: torch.Tensor, pattern: SparsityPattern, transposed: bool = False) -> tuple[int, int] | None:
    """The least and the most entries that a mask keeps of a group; `None` if it has no groups."""
    kept = to_groups(mask, pattern, transposed).sum(dim=1)
    return (int(kept.min()), int(kept.max())) if len(kept) else None


def sparsity_mask(tensor: torch.Tensor, pattern: SparsityPattern, transposed: bool = False) -> torch.Tensor:
    """
    The entries that the projection on the pattern keeps: the largest magnitudes of each group, exactly as many as the
    pattern says, also under ties, in groups of zeros, and with infinities (above numbers) and NaN (above infinities).

    Args:
        tensor, pattern, transposed:
            As for [`to_groups`].

    Returns:
        `torch.BoolTensor` of the shape of `tensor`: `True` where an entry is kept. For [`OwnPattern`], where it is not
            zero, in a tensor of any shape.

    Raises:
        `ValueError`: If the pattern does not fit the shape.
    """
    tensor = tensor.detach()
    if isinstance(pattern, OwnPattern):
        return tensor != 0
    if isinstance(pattern, DensityPattern) or pattern.group_size > WIDEST_COMPARED:
        groups = to_groups(tensor, pattern, transposed)
        if not groups.numel():
            return torch.zeros_like(tensor, dtype=torch.bool)
        mask = largest_by_threshold(groups, kept_per_group(pattern, groups.shape[1]))
        return from_groups(mask, pattern, tensor.shape, transposed)
    _check_fit(tensor, pattern, transposed)
    mask = torch.empty(tensor.shape, dtype=torch.bool, device=tensor.device)
    if not mask.numel():
        return mask
    rows, columns = _group_sides(pattern, transposed)
    in_place = rows == 1 and columns <= WIDEST_IN_PLACE and tensor.device.type == "cpu"
    for part, selected in row_chunks(tensor, mask, multiple=rows):
        if in_place:
            largest_in_rows(part.reshape(-1), columns, pattern.kept, selected.view(-1))
        else:
            layout = _columns(magnitude_keys(part), pattern, transposed)
            won = largest_in_columns(layout.reshape(pattern.group_size, -1), pattern.kept)
            _columns(selected, pattern, transposed).copy_(won.view(layout.shape))
    return mask


def _group_sides(pattern: NMPattern | BlockPattern, transposed: bool) -> tuple[int, int]:
    """Rows and columns that a group spans in a weight as it is stored."""
    sides = (pattern.rows, pattern.columns) if isinstance(pattern, BlockPattern) else (1, pattern.group_size)
    return sides[::-1] if transposed else sides


def _columns(stored: torch.Tensor, pattern: NMPattern | BlockPattern, transposed: bool) -> torch.Tensor:
    """A view whose first two dimensions run through a group, in the order that breaks ties; the others over groups."""
    rows, columns = _group_sides(pattern, transposed)
    blocks = stored.view(stored.shape[0] // rows, rows, stored.shape[1] // columns, columns)
    return blocks.permute(3, 1, 0, 2) if transposed else blocks.permute(1, 3, 0, 2)


def project(tensor: torch.Tensor, pattern: SparsityPattern, transposed: bool = False) -> torch.Tensor:
    """
    The Euclidean projection of a weight on the pattern.

    Args:
        tensor, pattern, transposed:
            As for [`to_groups`].

    Returns:
        `torch.Tensor` of the shape and dtype of `tensor`, the nearest one that obeys the pattern. Distance has no
        meaning under NaN and infinities: there it is what [`sparsity_mask`] keeps.

    Raises:
        `ValueError`: If the pattern does not fit the shape.
    """
    return zero_outside(tensor.detach().clone(), sparsity_mask(tensor, pattern, transposed))


def zero_outside(tensor: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Zeroes the entries outside the mask, in place. A product would leave NaN and -0.0 behind."""
    for part, kept in row_chunks(tensor, mask):
        if part.is_floating_point() and part.is_contiguous() and part.device.type == "cpu":
            # What `masked_fill_` does, vectorised: all bits of an entry survive, or none.
            bits = part.view(SAME_SIZE_INTEGER[part.element_size()])
            bits.bitwise_and_(kept.view(torch.int8).neg().to(bits.dtype))
        else:
            part.masked_fill_(~kept, 0)
    return tensor


def group_rows(pattern: SparsityPattern, transposed: bool, rows: int) -> int:
    """How many of the rows of a stored weight one group spans, out of all its `rows`."""
    return rows if isinstance(pattern, DensityPattern) else _group_sides(pattern, transposed)[0]


def broken_groups(tensor: torch.Tensor, pattern: SparsityPattern, transposed: bool = False) -> torch.Tensor:
    """
    The groups that hold more non-zero entries than the pattern allows.

    Args:
        tensor, pattern, transposed:
            As for [`to_groups`].

    Returns:
        `torch.BoolTensor` of shape `(groups,)`.

    Raises:
        `ValueError`: If the pattern does not fit the shape.
    """
    groups = to_groups(tensor.detach(), pattern, transposed)
    return (groups != 0).sum(dim=1) > kept_per_group(pattern, groups.shape[1])

"""What a legal group of weights is.

A sparsity pattern divides a weight of shape `(out_features, in_features)` into groups and says how many entries of
each group may be non-zero. `N` and `K` always count the entries that are **kept**.

| string | class | group |
| --- | --- | --- |
| `2:4`, any `N:M` | [`NMPattern`] | M consecutive inputs of one output |
| `4x4:8`, any `RxC:K` | [`BlockPattern`] | R outputs by C inputs |
| `0.5`, any density | [`DensityPattern`] | the whole weight |
| `own` | [`OwnPattern`] | each entry by itself: what is zero stays zero |
"""

import re
from dataclasses import dataclass, replace


OWN = "own"
ALLOWED_PATTERNS = (
    "'N:M' with 1 <= N <= M (N kept of every M consecutive inputs, such as '2:4'), 'RxC:K' with 1 <= K <= R*C (K kept "
    "of every block of R outputs by C inputs, such as '4x4:8'), a density between 0 and 1 (such as '0.5'), or 'own' "
    "(the zeros that the weights have already)"
)


# No dimension is longer, and int() refuses thousands of digits with an error of its own.
_NUMBER = r"([0-9]{1,18})"


def _invalid(given: str, reason: str) -> ValueError:
    return ValueError(f"Invalid sparsity pattern {given!r}: {reason}. Allowed: {ALLOWED_PATTERNS}.")


def _stage(progress: float) -> float:
    """The share of what is pruned in the end, in three steps."""
    return min(3, int(3 * progress) + 1) / 3


def _kept_at(kept: int, size: int, progress: float) -> int:
    """
    Entries to keep in a group on the way to `kept` of `size`. Groups that keep half or more have no way to go. Of
    others a third of what is to go goes at a time, so that the loss is asked again which entries matter: `1:4` by way
    of `3:4` and `2:4`.
    """
    return kept if 2 * kept >= size else size - round((size - kept) * _stage(progress))


@dataclass(frozen=True)
class NMPattern:
    """
    N kept of every M consecutive inputs, the semi-structured pattern that sparse tensor cores run at `2:4`.

    Args:
        kept (`int`):
            Entries kept in each group, N.
        group_size (`int`):
            Consecutive entries along the input dimension that form a group, M.

    Raises:
        `ValueError`: If not `1 <= kept <= group_size`.
    """

    kept: int
    group_size: int

    def __post_init__(self):
        if self.kept < 1:
            raise _invalid(str(self), "N is 0, which would prune every weight")
        if self.kept > self.group_size:
            raise _invalid(str(self), f"N = {self.kept} kept of M = {self.group_size} is more than there are")

    def __str__(self) -> str:
        return f"{self.kept}:{self.group_size}"

    @property
    def density(self) -> float:
        """Share of the entries that may be non-zero."""
        return self.kept / self.group_size

    def stage(self, progress: float) -> "NMPattern":
        """What to keep on the way to this pattern, `progress` of it gone: see [`_kept_at`]."""
        return replace(self, kept=_kept_at(self.kept, self.group_size, progress))

    def misfit(self, out_features: int, in_features: int) -> str | None:
        """Why the pattern does not fit a weight of that shape, or `None` if it does."""
        if in_features % self.group_size:
            return f"input dimension {in_features} is not a multiple of {self.group_size}"
        return None


@dataclass(frozen=True)
class BlockPattern:
    """
    K kept of every block of R outputs by C inputs, wherever they are in the block.

    Args:
        rows (`int`):
            Outputs in a block, R.
        columns (`int`):
            Inputs in a block, C.
        kept (`int`):
            Entries kept in each block, K.

    Raises:
        `ValueError`: If a side is 0 or not `1 <= kept <= rows * columns`.
    """

    rows: int
    columns: int
    kept: int

    def __post_init__(self):
        if self.rows < 1 or self.columns < 1:
            raise _invalid(str(self), "a side of the block is 0")
        if self.kept < 1:
            raise _invalid(str(self), "K is 0, which would prune every weight")
        if self.kept > self.group_size:
            raise _invalid(str(self), f"K = {self.kept} is more than the R*C = {self.group_size} entries of a block")

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}:{self.kept}"

    @property
    def group_size(self) -> int:
        """Entries in a block."""
        return self.rows * self.columns

    @property
    def density(self) -> float:
        """Share of the entries that may be non-zero."""
        return self.kept / self.group_size

    def stage(self, progress: float) -> "BlockPattern":
        """What to keep on the way to this pattern, `progress` of it gone: see [`_kept_at`]."""
        return replace(self, kept=_kept_at(self.kept, self.group_size, progress))

    def misfit(self, out_features: int, in_features: int) -> str | None:
        """Why the pattern does not fit a weight of that shape, or `None` if it does."""
        reasons = []
        if out_features % self.rows:
            reasons.append(f"output dimension {out_features} is not a multiple of {self.rows}")
        if in_features % self.columns:
            reasons.append(f"input dimension {in_features} is not a multiple of {self.columns}")
        return " and ".join(reasons) or None


@dataclass(frozen=True)
class DensityPattern:
    """
    Unstructured: the given share of each weight is kept, wherever it is. The upper bound to compare a pattern with.

    Args:
        density (`float`):
            Share kept, between 0 and 1 (both excluded).

    Raises:
        `ValueError`: If not `0 < density < 1`.
    """

    density: float

    def __post_init__(self):
        if not 0 < self.density < 1:
            raise _invalid(str(self), "a density must lie between 0 and 1, both excluded")

    def __str__(self) -> str:
        return repr(self.density)

    def kept_of(self, size: int) -> int:
        """Entries kept in a weight of `size` entries: the rounded share, at least one if there are any."""
        return min(size, max(1, round(self.density * size)))

    def stage(self, progress: float) -> "DensityPattern":
        """What to keep on the way to this pattern, `progress` of it gone: see [`_kept_at`]."""
        return self if self.density >= 0.5 else replace(self, density=1 - (1 - self.density) * _stage(progress))

    def misfit(self, out_features: int, in_features: int) -> str | None:
        """`None`: a density fits every shape."""
        return None


@dataclass(frozen=True)
class OwnPattern:
    """
    The zeros that each weight has already, in whatever pattern they lie. Which they are is not told by the pattern but
    by the weights when training begins, or by the checkpoint that they came from.
    """

    def __str__(self) -> str:
        return OWN

    def stage(self, progress: float) -> "OwnPattern":
        """Itself: there is no way to go."""
        return self

    def misfit(self, out_features: int, in_features: int) -> str | None:
        """`None`: a mask of its own fits every weight."""
        return None


SparsityPattern = NMPattern | BlockPattern | DensityPattern | OwnPattern


def parse_pattern(text: str) -> SparsityPattern:
    """
    Parses a pattern string.

    Args:
        text (`str`):
            `"N:M"`, `"RxC:K"`, a density or `"own"`, see the table of the module.

    Returns:
        [`NMPattern`], [`BlockPattern`], [`DensityPattern`] or [`OwnPattern`].

    Raises:
        `ValueError`: If the string has none of these forms, or its numbers are out of range.
    """
    stripped = str(text).strip()
    if stripped.lower() == OWN:
        return OwnPattern()
    if match := re.fullmatch(f"{_NUMBER}:{_NUMBER}", stripped):
        return NMPattern(*map(int, match.groups()))
    if match := re.fullmatch(f"{_NUMBER}x{_NUMBER}:{_NUMBER}", stripped):
        return BlockPattern(*map(int, match.groups()))
    try:
        density = float(stripped)
    except ValueError:
        raise _invalid(str(text), "it has none of the known forms") from None
    return DensityPattern(density)

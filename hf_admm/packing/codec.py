"""Packs the entries of a sparse weight into its values and their positions, and back: pure functions on tensors.

Entries are compared and moved as integers of their own width, so zero means that all bits are zero: -0.0 and every NaN
are values, and what is unpacked has the same bits. There are two encodings:

- `N:M`, for weights of which no group of M has more than N entries that are not zero: N values of each group, and the
  number of their position set among the C(M, N) there are. Numbers of several groups share a word, in base C(M, N): at
  `2:4` three groups a byte, 0.667 bits an entry, where a mask needs 1.
- `mask`, for any other: a bit for each entry, and the values that are not zero.

Groups run along the last dimension, or along the one before it if `transposed`. Either way the encoding is a stream: a
weight may be encoded and decoded in parts of whole words (see [`Encoding.step`]), each on its own.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from hf_admm.patterns import NMPattern, SparsityPattern, parse_pattern


# There are 2**M masks of a group, and a table has a row for each.
LARGEST_GROUP = 16

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

_TRANSPOSED = " transposed"


@dataclass(frozen=True)
class Encoding:
    """
    How a weight is packed.

    Args:
        pattern ([`NMPattern`], *optional*):
            The pattern that its groups obey; `None` for a mask of all entries.
        transposed (`bool`, *optional*, defaults to `False`):
            Whether groups run along the dimension before the last, as in a weight stored as `(in, out)`.
    """

    pattern: NMPattern | None = None
    transposed: bool = False

    def __str__(self) -> str:
        return "mask" if self.pattern is None else f"{self.pattern}{_TRANSPOSED if self.transposed else ''}"

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of that shape, which must not be empty, divides into whole groups."""
        if self.pattern is None:
            return True
        return (
            len(shape) > self.transposed
            and math.prod(shape) > 0
            and shape[-2 if self.transposed else -1] % self.pattern.group_size == 0
        )

    def step(self, shape: tuple[int, ...]) -> int:
        """The smallest number of consecutive entries of such a tensor that fills words: parts are multiples of it."""
        if self.pattern is None:
            return 8
        _, digits = _word(self.pattern)
        return digits * self.pattern.group_size * (shape[-1] if self.transposed else 1)

    def sizes(self, entries: int, occupied: int) -> tuple[int, int]:
        """
        What packing takes.

        Args:
            entries (`int`):
                Number of entries.
            occupied (`int`):
                How many of them are not zero.

        Returns:
            `tuple[int, int]`: Number of values, and bytes of the positions.
        """
        if self.pattern is None:
            return occupied, -(-entries // 8)
        groups = entries // self.pattern.group_size
        size, digits = _word(self.pattern)
        return groups * self.pattern.kept, -(-groups // digits) * size


def nm_encodings(pattern: SparsityPattern) -> list[Encoding]:
    """The encodings by groups, straight and transposed, that a pattern allows: none but for `N:M` up to M = 16."""
    if not isinstance(pattern, NMPattern) or pattern.group_size > LARGEST_GROUP or pattern.density == 1:
        return []
    return [Encoding(pattern, transposed) for transposed in (False, True)]


def parse_encoding(text: str) -> Encoding:
    """
    Parses what `str` makes of an [`Encoding`].

    Args:
        text (`str`):
            `"mask"`, or an `N:M` pattern with M up to 16, with `" transposed"` after it for a transposed weight.

    Returns:
        [`Encoding`].

    Raises:
        `ValueError`: If it is neither.
    """
    known = [Encoding()] if text == "mask" else nm_encodings(parse_pattern(text.removesuffix(_TRANSPOSED)))
    for encoding in known:
        if str(encoding) == text:
            return encoding
    raise ValueError(
        f"Unknown encoding {text!r}. Allowed: 'mask', or 'N:M' with N < M <= {LARGEST_GROUP}, alone or with "
        f"'{_TRANSPOSED}' after it."
    )


def obeys(entries: torch.Tensor, encoding: Encoding, shape: tuple[int, ...]) -> bool:
    """
    Whether an encoding can hold these entries.

    Args:
        entries (`torch.Tensor`):
            Integers in one dimension: whole groups of a tensor of that shape, as they are stored.
        encoding ([`Encoding`]):
            The encoding.
        shape (`tuple[int, ...]`):
            The shape of the whole tensor.

    Returns:
        `bool`: `False` if a group has more values than the pattern keeps. A mask holds anything.
    """
    if encoding.pattern is None:
        return True
    dim = 1 if encoding.transposed else -1
    counts = _as_groups(entries != 0, encoding, shape).sum(dim=dim, dtype=torch.uint8)
    return int(counts.max()) <= encoding.pattern.kept


def pack(entries: torch.Tensor, encoding: Encoding, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Packs entries.

    Args:
        entries (`torch.Tensor`):
            Integers in one dimension: a tensor of that shape or a part of it, a multiple of [`Encoding.step`] long
            unless it is the last.
        encoding ([`Encoding`]):
            The encoding.
        shape (`tuple[int, ...]`):
            The shape of the whole tensor.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: The values, integers as `entries` are, and the bytes of their positions.

    Raises:
        `ValueError`: If a group has more values than the pattern keeps.
    """
    if encoding.pattern is None:
        occupied = entries != 0
        return entries[occupied], torch.from_numpy(np.packbits(occupied.numpy(), bitorder="little"))
    groups = _as_groups(entries, encoding, shape)
    if encoding.transposed:
        groups = groups.transpose(1, 2).reshape(-1, encoding.pattern.group_size)
    codes = torch.zeros(len(groups), dtype=torch.int32)
    for position, column in enumerate((groups != 0).unbind(1)):
        codes.add_(column, alpha=1 << position)
    numbers, masks = _tables(encoding.pattern)
    numbers = numbers.index_select(0, codes)
    if int(numbers.min()) < 0:
        raise ValueError(f"A group holds more than the {encoding.pattern.kept} values that {encoding} keeps.")
    return groups[masks.index_select(0, numbers)], _to_words(numbers, encoding.pattern)


def unpack(
    values: torch.Tensor, positions: torch.Tensor, encoding: Encoding, shape: tuple[int, ...], size: int
) -> torch.Tensor:
    """
    The inverse of [`pack`].

    Args:
        values (`torch.Tensor`):
            Integers in one dimension.
        positions (`torch.Tensor`):
            The bytes of their positions.
        encoding ([`Encoding`]):
            The encoding.
        shape (`tuple[int, ...]`):
            The shape of the whole tensor.
        size (`int`):
            Number of entries in this part of it.

    Returns:
        `torch.Tensor`: `size` integers.

    Raises:
        `ValueError`: If values or positions are too many or too few, or a position is none that packing writes.
    """
    if len(positions) != encoding.sizes(size, 0)[1]:
        raise ValueError(f"{len(positions)} bytes of positions for {size} entries in encoding {encoding}")
    if encoding.pattern is None:
        mask = _mask_bits(positions, size)
    else:
        mask = _tables(encoding.pattern)[1].index_select(0, _from_words(positions, encoding.pattern, size))
    expected = int(mask.sum())
    if len(values) != expected:
        raise ValueError(f"{len(values)} values for {expected} positions")
    entries = torch.zeros(mask.shape, dtype=values.dtype).masked_scatter_(mask, values)
    if encoding.transposed:
        entries = entries.reshape(-1, shape[-1], mask.shape[1]).transpose(1, 2)
    return entries.reshape(-1)


def count_values(positions: torch.Tensor) -> int:
    """How many values the positions of a mask stand for."""
    return int(_BIT_COUNTS.index_select(0, positions.int()).sum(dtype=torch.int64))


def _as_groups(entries: torch.Tensor, encoding: Encoding, shape: tuple[int, ...]) -> torch.Tensor:
    """`(groups, M)`; if transposed, `(rows of groups, M, columns)`."""
    size = encoding.pattern.group_size
    return entries.view(-1, size, shape[-1]) if encoding.transposed else entries.view(-1, size)


@lru_cache
def _tables(pattern: NMPattern) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The number of each mask of a group (-1: too many), and the mask of each number. Sets of positions are numbered in
    ascending order of their masks; a group with fewer values takes its lowest free positions, too, for zeros.
    """
    codes = [code for code in range(1 << pattern.group_size) if code.bit_count() == pattern.kept]
    number_of = {code: number for number, code in enumerate(codes)}
    numbers = []
    for code in range(1 << pattern.group_size):
        while code.bit_count() < pattern.kept:
            code |= code + 1
        numbers.append(number_of.get(code, -1))
    masks = torch.tensor(codes)[:, None] >> torch.arange(pattern.group_size) & 1
    return torch.tensor(numbers, dtype=torch.int32), masks.bool()


@lru_cache
def _word(pattern: NMPattern) -> tuple[int, int]:
    """Bytes of a word and the groups in it: the densest of 1, 2 and 4 bytes, the shortest of equals."""
    base = math.comb(pattern.group_size, pattern.kept)
    words = []
    for size in (1, 2, 4):
        digits = 0
        while base ** (digits + 1) <= 256**size:
            digits += 1
        words.append((size, digits))
    return max(words, key=lambda word: (word[1] / word[0], -word[0]))


def _to_words(numbers: torch.Tensor, pattern: NMPattern) -> torch.Tensor:
    """Little-endian words of several numbers, the first one least significant, zeros after the last."""
    (size, digits), base = _word(pattern), math.comb(pattern.group_size, pattern.kept)
    padded = torch.nn.functional.pad(numbers, (0, -len(numbers) % digits)).view(-1, digits).long()
    words = torch.zeros(len(padded), dtype=torch.int64)
    for digit in reversed(range(digits)):
        words.mul_(base).add_(padded[:, digit])
    return torch.stack([words >> 8 * byte & 255 for byte in range(size)], dim=1).to(torch.uint8).reshape(-1)


def _from_words(positions: torch.Tensor, pattern: NMPattern, size: int) -> torch.Tensor:
    (width, digits), base = _word(pattern), math.comb(pattern.group_size, pattern.kept)
    groups = size // pattern.group_size
    parts = positions.view(-1, width).long()
    words = sum(parts[:, byte] << 8 * byte for byte in range(width))
    numbers = torch.empty(len(parts), digits, dtype=torch.int32)
    for digit in range(digits):
        numbers[:, digit] = words % base
        words = words.div_(base, rounding_mode="floor") if digit else words // base
    numbers = numbers.view(-1)
    if words.any() or numbers[groups:].any():
        raise ValueError(f"positions out of the range of {pattern}")
    return numbers[:groups]


_BIT_COUNTS = torch.tensor([byte.bit_count() for byte in range(256)], dtype=torch.uint8)


def _mask_bits(positions: torch.Tensor, size: int) -> torch.Tensor:
    bits = np.unpackbits(positions.numpy(), bitorder="little")
    if bits[size:].any():
        raise ValueError(f"positions beyond the {size} entries there are")
    return torch.from_numpy(bits[:size].view(bool))

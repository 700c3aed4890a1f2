"""Packed files: sparse weights as values and positions, everything else as it was, lossless.

A packed file is a safetensors file, see docs/packed_format.md. It is read in pieces of some megabytes, so that one of
any size takes little memory, and every byte it gives is checked against the checksum of the source.
"""

import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from hf_admm.packing.codec import INTEGERS, Encoding, count_values, parse_encoding, unpack
from hf_admm.packing.header import ITEM_BYTES, Entry, Header, parse_header, read_header


FORMAT = "hf_admm.packed"
FORMAT_VERSION = 1

# Bytes that are handled at a time.
_PIECE = 1 << 20


@dataclass(frozen=True)
class PackedFile:
    """
    A packed file whose header was read and found consistent.

    Args:
        path (`Path`):
            The file.
        header ([`Header`]):
            Its own header.
        source ([`Header`]):
            The header of the file it was packed from, where every tensor has its dtype, shape and place.
        encodings (`dict[str, Encoding]`):
            How each packed tensor is packed.
        checksums (`list[int]`):
            CRC-32 of the source's header, then of the bytes of each of its tensors in the order of the file.
    """

    path: Path
    header: Header
    source: Header
    encodings: dict[str, Encoding]
    checksums: list[int]

    @property
    def dense_bytes(self) -> int:
        """Bytes of the packed weights in the source."""
        return sum(entry.size for entry in self.source.entries if entry.name in self.encodings)

    @property
    def packed_bytes(self) -> int:
        """Every byte of the file, headers included, but those of the tensors that are stored as they are."""
        return self.header.file_size - (self.source.data_size - self.dense_bytes)


def open_packed(path: Path) -> PackedFile:
    """
    Reads the header of a packed file.

    Args:
        path (`Path`):
            The file.

    Returns:
        [`PackedFile`].

    Raises:
        `ValueError`: If it is no packed file, of another version of the format, or damaged.
    """
    header = read_header(path)
    metadata = header.metadata
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{path} is not a packed file: its metadata has format {metadata.get('format')!r}, not {FORMAT!r}. Give "
            "what `hf-admm pack` wrote."
        )
    if metadata.get("format_version") != str(FORMAT_VERSION):
        raise ValueError(
            f"{path} has format version {metadata.get('format_version')!r}, and this release of hf_admm reads "
            f"{FORMAT_VERSION}. Unpack it with the release that wrote it, or upgrade hf_admm."
        )
    try:
        text, digits = metadata["source_header"], metadata["crc32"]
        source = parse_header(text)
        checksums = [int(digits[at : at + 8], 16) for at in range(0, len(digits), 8)]
        lists = {parse_encoding(how): names for how, names in json.loads(metadata["packed"]).items()}
        listed = [(name, encoding) for encoding, names in lists.items() for name in names]
        encodings = dict(listed)
        if len(checksums) != 1 + len(source.entries) or checksums[0] != zlib.crc32(text.encode()):
            raise ValueError("the checksums are not those of the source's header")
        if len(encodings) != len(listed) or not encodings.keys() <= {entry.name for entry in source.entries}:
            raise ValueError("the list of packed tensors names some that there are not, or some twice")
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise _damaged(path, "the metadata", f"{type(error).__name__}: {error}") from error
    packed = PackedFile(path, header, source, encodings, checksums)
    _check_entries(packed)
    return packed


def _check_entries(packed: PackedFile) -> None:
    """Whether each tensor of the source has what it needs, of the right dtype and size, and nothing else is there."""
    held = {entry.name: entry for entry in packed.header.entries}
    for entry in packed.source.entries:
        encoding = packed.encodings.get(entry.name)
        if encoding is None:
            own = held.pop(entry.name, None)
            if own is None or (own.dtype, own.shape, own.size) != (entry.dtype, entry.shape, entry.size):
                raise _damaged(packed.path, entry.name, "it is missing or of another dtype or shape")
            continue
        values, positions = (held.pop(name, None) for name in part_names(entry.name))
        item = ITEM_BYTES.get(entry.dtype)
        if values is None or positions is None:
            raise _damaged(packed.path, entry.name, "its values or positions are missing")
        if item is None or not entry.size or not encoding.fits(entry.shape):
            raise _damaged(packed.path, entry.name, f"{entry.dtype} of shape {entry.shape} can't be packed {encoding}")
        count, size = encoding.sizes(entry.size // item, values.size // item)
        if (values.dtype, values.shape, values.size) != (entry.dtype, (count,), count * item):
            raise _damaged(packed.path, entry.name, f"{values.dtype} values of shape {values.shape}")
        if (positions.dtype, positions.shape) != ("U8", (size,)):
            raise _damaged(packed.path, entry.name, f"{positions.dtype} positions of shape {positions.shape}")
    if held:
        raise _damaged(packed.path, ", ".join(held), "not expected there")


def restore(packed: PackedFile) -> Iterator[memoryview | bytes | bytearray]:
    """
    The bytes of the file that was packed.

    Args:
        packed ([`PackedFile`]):
            The packed file.

    Yields:
        `bytes`, `bytearray` or `memoryview`: Its next bytes, some megabytes at a time.

    Raises:
        `ValueError`: If the file is damaged: what was yielded of the tensor that is named is then worth nothing.
    """
    held = {entry.name: entry for entry in packed.header.entries}
    yield packed.source.prefix
    with open(packed.path, "rb") as file:
        for entry, expected in zip(packed.source.entries, packed.checksums[1:], strict=True):
            checksum = 0
            try:
                if entry.name in packed.encodings:
                    parts = [held[name] for name in part_names(entry.name)]
                    pieces = _unpacked(file, entry, packed.encodings[entry.name], packed.header.start, *parts)
                else:
                    pieces = read_pieces(file, packed.header.start + held[entry.name].start, entry.size, 1)
                for piece in pieces:
                    checksum = zlib.crc32(piece, checksum)
                    yield piece
            except ValueError as error:
                raise _damaged(packed.path, entry.name, error) from error
            if checksum != expected:
                raise _damaged(packed.path, entry.name, f"its checksum is {checksum:08x}, not {expected:08x}")


def part_names(name: str) -> tuple[str, str]:
    """The names of the values and the positions of a packed tensor."""
    return f"{name}.values", f"{name}.positions"


def read_pieces(file: BinaryIO, start: int, size: int, step: int) -> Iterator[bytearray]:
    """Some megabytes at a time, each but the last a multiple of `step` bytes."""
    length = max(1, _PIECE // step) * step
    for first in range(0, size, length):
        yield _read(file, start + first, min(length, size - first))


def _unpacked(
    file: BinaryIO, entry: Entry, encoding: Encoding, start: int, values: Entry, positions: Entry
) -> Iterator[memoryview]:
    item, step = ITEM_BYTES[entry.dtype], encoding.step(entry.shape)
    values_at, positions_at, values_left = start + values.start, start + positions.start, values.shape[0]
    length, total = max(1, _PIECE // item // step) * step, entry.size // item
    for first in range(0, total, length):
        size = min(length, total - first)
        count, bytes_of_positions = encoding.sizes(size, 0)
        where = as_tensor(_read(file, positions_at, bytes_of_positions), torch.uint8)
        if encoding.pattern is None:
            count = count_values(where)
        if count > values_left:
            raise ValueError("fewer values than positions")
        what = as_tensor(_read(file, values_at, count * item), INTEGERS[item])
        yield as_bytes(unpack(what, where, encoding, entry.shape, size))
        positions_at += bytes_of_positions
        values_at += count * item
        values_left -= count
    if values_left:
        raise ValueError("more values than positions")


def _read(file: BinaryIO, start: int, size: int) -> bytearray:
    content = bytearray(size)
    file.seek(start)
    if file.readinto(content) != size:
        raise ValueError(f"{file.name} ended within {size} bytes at {start}: it is being written to")
    return content


def as_tensor(content: bytearray, dtype: torch.dtype) -> torch.Tensor:
    """Bytes as integers, in place."""
    return torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """Integers as bytes, in place."""
    return memoryview(tensor.view(torch.uint8).numpy())


def _damaged(path: Path, what: str, reason: object) -> ValueError:
    return ValueError(f"{path} is damaged in {what} ({reason}). Copy it again, or pack the checkpoint again.")

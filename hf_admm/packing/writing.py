"""Writing packed files.

The source is read twice, in pieces of some megabytes: first to learn what becomes smaller, because a header that holds
the sizes comes first, then to pack it. What was written is read back at the end, for the source may be deleted
afterwards.
"""

import json
import zlib
from dataclasses import dataclass
from pathlib import Path

from hf_admm.packing.codec import INTEGERS, Encoding, nm_encodings, obeys, pack
from hf_admm.packing.files import (
    FORMAT,
    FORMAT_VERSION,
    PackedFile,
    as_bytes,
    as_tensor,
    open_packed,
    part_names,
    read_pieces,
    restore,
)
from hf_admm.packing.header import ITEM_BYTES, Entry, Header, build_header, read_header
from hf_admm.patterns import SparsityPattern


@dataclass(frozen=True)
class Plan:
    """
    What packing a file will write.

    Args:
        path (`Path`):
            The file to pack.
        header ([`Header`]):
            Its header.
        packed (`dict[str, tuple[Encoding, int, int]]`):
            Of each tensor that becomes smaller, how it is packed, the number of its values and the bytes of positions.
        checksums (`list[int]`):
            As those of [`PackedFile`].
    """

    path: Path
    header: Header
    packed: dict[str, tuple[Encoding, int, int]]
    checksums: list[int]


def plan_file(path: Path, pattern: SparsityPattern) -> Plan:
    """
    Finds what of a safetensors file becomes smaller.

    Args:
        path (`Path`):
            The file.
        pattern ([`SparsityPattern`]):
            The pattern that its weights are tried for. A weight that does not obey is packed by a mask.

    Returns:
        [`Plan`]: What [`write_packed`] takes.

    Raises:
        `ValueError`: If the file is no safetensors file, or packed already.
    """
    header = read_header(path)
    if header.metadata.get("format") == FORMAT:
        raise ValueError(f"{path} is packed already. Give a plain checkpoint, or use `hf-admm unpack` to get one.")
    packed, checksums = {}, [zlib.crc32(header.text.encode())]
    taken = {entry.name for entry in header.entries}
    with open(path, "rb") as file:
        for entry in header.entries:
            ways = [] if taken & set(part_names(entry.name)) else _ways(entry, pattern)
            item = ITEM_BYTES.get(entry.dtype, 1)
            # Whole groups of every way: those of the transposed one are whole rows.
            step = max([way.step(entry.shape) for way in ways if way.pattern], default=1)
            checksum = occupied = 0
            for piece in read_pieces(file, header.start + entry.start, entry.size, step * item):
                checksum = zlib.crc32(piece, checksum)
                if ways:
                    entries = as_tensor(piece, INTEGERS[item])
                    occupied += int(entries.count_nonzero())
                    ways = [way for way in ways if obeys(entries, way, entry.shape)]
            checksums.append(checksum)
            sizes = [(way, *way.sizes(entry.size // item, occupied)) for way in ways]
            best = min(sizes, key=lambda size: size[1] * item + size[2], default=None)
            if best and best[1] * item + best[2] < entry.size:
                packed[entry.name] = best
    return Plan(path, header, packed, checksums)


def _ways(entry: Entry, pattern: SparsityPattern) -> list[Encoding]:
    """The encodings to try for a tensor: none if it is no matrix, or of a dtype that is not packed."""
    if entry.dtype not in ITEM_BYTES or len(entry.shape) < 2 or not entry.size:
        return []
    return [encoding for encoding in [*nm_encodings(pattern), Encoding()] if encoding.fits(entry.shape)]


def write_packed(plan: Plan, path: Path) -> PackedFile:
    """
    Writes a packed file and reads it back.

    Args:
        plan ([`Plan`]):
            What [`plan_file`] returned.
        path (`Path`):
            The file to write.

    Returns:
        [`PackedFile`].

    Raises:
        `ValueError`: If what was written does not unpack to what was planned.
    """
    # Positions come last, so that their odd sizes leave the values aligned.
    entries, positions = [], []
    for entry in plan.header.entries:
        if entry.name in plan.packed:
            _, values, size = plan.packed[entry.name]
            values_name, positions_name = part_names(entry.name)
            entries.append((values_name, entry.dtype, (values,), values * ITEM_BYTES[entry.dtype]))
            positions.append((positions_name, "U8", (size,), size))
        else:
            entries.append((entry.name, entry.dtype, entry.shape, entry.size))
    by_encoding: dict[str, list[str]] = {}
    for name, (encoding, *_) in plan.packed.items():
        by_encoding.setdefault(str(encoding), []).append(name)
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "packed": json.dumps(by_encoding, separators=(",", ":")),
        "crc32": "".join(f"{checksum:08x}" for checksum in plan.checksums),
        "source_header": plan.header.text,
    }
    header = build_header(metadata, entries + positions)
    at = {entry.name: header.start + entry.start for entry in header.entries}
    with open(plan.path, "rb") as source, open(path, "wb") as target:
        target.write(header.prefix)
        for entry in plan.header.entries:
            start = plan.header.start + entry.start
            if entry.name in plan.packed:
                item, encoding = ITEM_BYTES[entry.dtype], plan.packed[entry.name][0]
                places = [at[name] for name in part_names(entry.name)]
                for piece in read_pieces(source, start, entry.size, encoding.step(entry.shape) * item):
                    parts = pack(as_tensor(piece, INTEGERS[item]), encoding, entry.shape)
                    for index, part in enumerate(parts):
                        target.seek(places[index])
                        places[index] += target.write(as_bytes(part))
            else:
                target.seek(at[entry.name])
                for piece in read_pieces(source, start, entry.size, 1):
                    target.write(piece)
    try:
        packed = open_packed(path)
        for _ in restore(packed):
            pass
    except ValueError as error:
        raise ValueError(
            f"What was packed of {plan.path} does not unpack to it: it was written to meanwhile, or the disk fails. "
            f"Pack it again when nothing writes to it ({error})."
        ) from error
    return packed

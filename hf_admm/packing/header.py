"""The header of a safetensors file, byte for byte: `safetensors` itself reads tensors, and writes them all at once.

A file is eight bytes with the length of the header (little-endian), the header (JSON), and the bytes of the tensors.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path


# Bytes of an entry, of the dtypes that safetensors has always had. Others pass unread.
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
ITEM_BYTES |= {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1}

# What the safetensors library reads at most.
_LONGEST = 100_000_000

_UNREADABLE = (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError)


@dataclass(frozen=True)
class Entry:
    """
    A tensor of a file.

    Args:
        name (`str`):
            Its name.
        dtype (`str`):
            Its dtype as safetensors names it, such as `"BF16"`.
        shape (`tuple[int, ...]`):
            Its shape.
        start (`int`):
            Where it starts, in bytes from the end of the header.
        size (`int`):
            Its bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


@dataclass(frozen=True)
class Header:
    """
    The header of a file.

    Args:
        text (`str`):
            The JSON, with the spaces that pad it.
        metadata (`dict[str, str]`):
            What the writer noted in it.
        entries (`list[Entry]`):
            The tensors in the order of their bytes, without a gap.
    """

    text: str
    metadata: dict[str, str]
    entries: list[Entry]

    @property
    def prefix(self) -> bytes:
        """The bytes of the file before those of the tensors."""
        encoded = self.text.encode()
        return len(encoded).to_bytes(8, "little") + encoded

    @property
    def start(self) -> int:
        """Where the bytes of the tensors start."""
        return 8 + len(self.text.encode())

    @property
    def data_size(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.size for entry in self.entries)

    @property
    def file_size(self) -> int:
        """Bytes of the file."""
        return self.start + self.data_size


def read_header(path: Path) -> Header:
    """
    Reads the header of a file.

    Args:
        path (`Path`):
            A safetensors file.

    Returns:
        [`Header`].

    Raises:
        `ValueError`: If it is none, or its size is not what the header says.
    """
    try:
        with open(path, "rb") as file:
            actual = file.seek(0, 2)
            file.seek(0)
            length = int.from_bytes(file.read(8), "little")
            if actual < 8 or length > min(actual - 8, _LONGEST):
                raise ValueError(f"{actual} bytes, a header of {length}")
            header = parse_header(file.read(length).decode())
        if header.file_size != actual:
            raise ValueError(f"{actual} bytes, and its header tells of {header.file_size}")
        return header
    except _UNREADABLE as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error}). Copy or save it again.") from error


def parse_header(text: str) -> Header:
    """
    Parses the JSON of a header.

    Args:
        text (`str`):
            The JSON.

    Returns:
        [`Header`].

    Raises:
        `ValueError`, `TypeError`, `KeyError`, `AttributeError`, `RecursionError`: If it is not the header of a file.
    """
    content = json.loads(text)
    metadata = content.pop("__metadata__", None) or {}
    if not all(type(item) is str for pair in metadata.items() for item in pair):
        raise ValueError("its metadata are not all strings")
    entries = []
    for name, entry in content.items():
        name.encode()  # half a surrogate pair is legal JSON, and can't be printed
        shape, (start, end) = entry["shape"], entry["data_offsets"]
        if not all(type(number) is int and number >= 0 for number in (*shape, start, end)):
            raise ValueError(f"shape {shape} and offsets {start}, {end} of {name}")
        if type(entry["dtype"]) is not str:
            raise ValueError(f"dtype {entry['dtype']} of {name}")
        entries.append(Entry(name, entry["dtype"], tuple(shape), start, end - start))
    entries.sort(key=lambda entry: (entry.start, entry.size))
    end = 0
    for entry in entries:
        item = ITEM_BYTES.get(entry.dtype)
        wrong_size = item is not None and entry.size != item * math.prod(entry.shape)
        if entry.start != end or entry.size < 0 or wrong_size:
            raise ValueError(f"the place of {entry.name}, {entry.size} bytes at {entry.start}")
        end += entry.size
    return Header(text, metadata, entries)


def build_header(metadata: dict[str, str], tensors: list[tuple[str, str, tuple[int, ...], int]]) -> Header:
    """
    Builds the header of a file to write.

    Args:
        metadata (`dict[str, str]`):
            What to note in it.
        tensors (`list[tuple[str, str, tuple[int, ...], int]]`):
            Name, dtype, shape and bytes of each tensor, in the order of the file.

    Returns:
        [`Header`].

    Raises:
        `ValueError`: If it is longer than any reader takes.
    """
    content: dict[str, dict] = {"__metadata__": metadata}
    entries, start = [], 0
    for name, dtype, shape, size in tensors:
        content[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, start + size]}
        entries.append(Entry(name, dtype, shape, start, size))
        start += size
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False)
    text += " " * (-len(text.encode()) % 8)  # tensors are mapped into memory where they lie
    if len(text.encode()) > _LONGEST:
        raise ValueError(
            f"The header of {len(tensors)} tensors takes more than {_LONGEST} bytes, which no reader of safetensors "
            "takes. Save the model in more shards (max_shard_size) and pack that."
        )
    return Header(text, metadata, entries)

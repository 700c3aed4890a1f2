"""Packs and unpacks whole checkpoints, which appear when all of their files are on disk, or not at all."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from hf_admm.audit import DEFAULT_PATTERN
from hf_admm.checkpoint_files import INDEX_NAME, read_record, sync, weight_files
from hf_admm.packing.files import PackedFile, open_packed, restore
from hf_admm.packing.writing import plan_file, write_packed
from hf_admm.patterns import SparsityPattern, parse_pattern


PLAIN_SUFFIX = ".safetensors"
PACKED_SUFFIX = ".packed.safetensors"

# What only a resume reads, and other checkpoints: no part of a model.
TRAINING_FILES = (
    *("admm_state.*", "optimizer.*", "scheduler.pt", "scaler.pt", "rng_state*.pth", "trainer_state.json"),
    *("optimizer_*", "pytorch_model_fsdp*", "global_step*", "checkpoint-*", "_saving"),
)


@dataclass(frozen=True)
class PackingReport:
    """
    What was packed or unpacked.

    Args:
        files (`list[tuple[str, int, int]]`):
            Of each file with tensors, its name when plain, and its bytes plain and packed.
        tensors (`int`):
            Tensors in these files.
        encodings (`dict[str, str]`):
            Of each packed tensor, how it is packed: as `N:M` groups, `N:M transposed`, or by a `mask`.
        dense_bytes (`int`):
            Bytes of the packed tensors when plain.
        packed_bytes (`int`):
            Bytes that stand for them, with the headers of the packed files.
        left_out (`list[str]`):
            What of the source is not in the destination, because it belongs to training or is no file.
    """

    files: list[tuple[str, int, int]]
    tensors: int
    encodings: dict[str, str]
    dense_bytes: int
    packed_bytes: int
    left_out: list[str]

    @property
    def ratio(self) -> float:
        """`packed_bytes / dense_bytes`."""
        return self.packed_bytes / self.dense_bytes if self.dense_bytes else 1.0

    def table(self) -> str:
        """A plain-text table with a row for each file and lines that sum up."""
        rows = [("file", "plain bytes", "packed bytes", "ratio")]
        for name, plain, packed in self.files:
            rows.append((name, f"{plain:,}", f"{packed:,}", f"{packed / plain:.4f}"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
        ]  # fmt: skip
        lines.insert(1, "-" * (sum(widths) + 2 * (len(widths) - 1)))
        how = ", ".join(f"{count} as {encoding}" for encoding, count in Counter(self.encodings.values()).items())
        lines.append(
            f"{len(self.encodings)} of {self.tensors} tensors packed ({how or 'none'}): {self.dense_bytes:,} dense "
            f"bytes in {self.packed_bytes:,}, headers included, {self.ratio:.4f}x"
        )
        if self.left_out:
            lines.append(f"left out, no part of the model: {', '.join(self.left_out)}")
        return "\n".join(lines)


def pack_checkpoint(
    source: str | Path, destination: str | Path, pattern: SparsityPattern | str | None = None
) -> PackingReport:
    """
    Packs the sparse weights of a checkpoint. Every weight keeps its bits, whether it obeys the pattern or not.

    Args:
        source (`str` or `Path`):
            A folder with `model.safetensors` or with an index and its shards, or one `.safetensors` file.
        destination (`str` or `Path`):
            The folder or file to write. Must not exist.
        pattern ([`SparsityPattern`] or `str`, *optional*):
            The pattern to try on each weight. Defaults to the recorded one if the checkpoint holds a record, else to
            `"2:4"`. A weight that does not obey it is packed by a mask if that is smaller, else stored as it is.

    Returns:
        [`PackingReport`].

    Raises:
        `ValueError`: If the source is no checkpoint, is damaged or packed already, no tensor of it becomes smaller,
            the pattern is invalid, or the destination exists or can't be written.
    """
    source, destination = Path(source), Path(destination)
    left_out: list[str] = []
    with _staged(source, destination) as staged:
        files = list(weight_files(source))
        if pattern is None:
            record = read_record(source)
            pattern = record.pattern if record else DEFAULT_PATTERN
        pattern = parse_pattern(str(pattern))
        if strays := [file.name for file in _listed(source) if file.name.endswith(PACKED_SUFFIX)]:
            raise ValueError(f"{source} holds packed files: {', '.join(strays)}. Move them elsewhere, or unpack them.")
        plans = [plan_file(file, pattern) for file in files]
        if not any(plan.packed for plan in plans):
            raise ValueError(
                f"Nothing in {source} becomes smaller: no matrix has {pattern} groups, nor zeros enough for a mask. "
                "Give the checkpoint of a sparse model (`hf-admm verify` shows its zeros), or its --pattern."
            )
        packed = []
        for plan in plans:
            target = staged / f"{plan.path.name.removesuffix(PLAIN_SUFFIX)}{PACKED_SUFFIX}"
            packed.append(write_packed(plan, target if source.is_dir() else staged))
        if source.is_dir():
            left_out = _copy_others(source, staged, {file.name for file in files}, TRAINING_FILES)
    return _report(packed, [file.name for file in files], left_out)


def unpack_checkpoint(source: str | Path, destination: str | Path) -> PackingReport:
    """
    Restores what was packed: files with tensors byte for byte.

    Args:
        source (`str` or `Path`):
            A folder or file that [`pack_checkpoint`] wrote.
        destination (`str` or `Path`):
            The folder or file to write. Must not exist.

    Returns:
        [`PackingReport`].

    Raises:
        `ValueError`: If the source is not packed, of another version of the format, or damaged, or the destination
            exists or can't be written.
    """
    source, destination = Path(source), Path(destination)
    left_out: list[str] = []
    with _staged(source, destination) as staged:
        files = (
            [file for file in _listed(source) if file.name.endswith(PACKED_SUFFIX)] if source.is_dir() else [source]
        )
        if not files:
            raise ValueError(f"{source} holds no *{PACKED_SUFFIX}. Give a folder or file that `hf-admm pack` wrote.")
        packed = [open_packed(file) for file in files]
        names = [f"{file.name.removesuffix(PACKED_SUFFIX)}{PLAIN_SUFFIX}" for file in files]
        if source.is_dir():
            if both := [name for name in names if (source / name).exists()]:
                raise ValueError(
                    f"{source} holds both {', '.join(both)} and packed files of the same. Move one kind elsewhere."
                )
            _check_shards(source, names)
            left_out = _copy_others(source, staged, {file.name for file in files}, ())
        for file, name in zip(packed, names, strict=True):
            with open(staged / name if source.is_dir() else staged, "xb") as target:
                for piece in restore(file):
                    target.write(piece)
    return _report(packed, names, left_out)


def _report(packed: list[PackedFile], names: list[str], left_out: list[str]) -> PackingReport:
    return PackingReport(
        [(name, file.source.file_size, file.header.file_size) for name, file in zip(names, packed, strict=True)],
        sum(len(file.source.entries) for file in packed),
        {name: str(encoding) for file in packed for name, encoding in file.encodings.items()},
        sum(file.dense_bytes for file in packed),
        sum(file.packed_bytes for file in packed),
        left_out,
    )


def _check_shards(source: Path, names: list[str]) -> None:
    """Whether the shards that the index names will be there."""
    index = source / INDEX_NAME
    if not index.is_file():
        return
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"The index {index} is damaged ({type(error).__name__}: {error}). Copy it again.") from error
    there = {*names, *(file.name for file in _listed(source))}
    if missing := sorted(str(shard) for shard in shards - there):
        raise ValueError(
            f"The index {index} names shards that there are no packed files of: {', '.join(missing)}. Copy them there."
        )


def _listed(source: Path) -> list[Path]:
    return sorted(source.iterdir()) if source.is_dir() else []


def _copy_others(source: Path, target: Path, done: set[str], unwanted: tuple[str, ...]) -> list[str]:
    """Copies what is not done by other means; returns what is left out."""
    left_out = []
    for path in _listed(source):
        if path.name in done:
            continue
        if any(fnmatch(path.name, name) for name in unwanted) or not (path.is_file() or path.is_dir()):
            left_out.append(path.name)
        elif path.is_dir():
            shutil.copytree(path, target / path.name)
        else:
            shutil.copy2(path, target / path.name)
    return left_out


@contextmanager
def _staged(source: Path, destination: Path) -> Iterator[Path]:
    """A temporary name for the destination, which gets its own when all went well; otherwise nothing is left."""
    staged = None
    try:
        _check_places(source, destination)
        staged = destination.with_name(f".{destination.name}.{os.getpid()}.partial")
        if source.is_dir():
            staged.mkdir()
        yield staged
        for path in [staged, *staged.rglob("*")]:
            sync(path)
        os.rename(staged, destination)
        sync(destination.parent)
    except OSError as error:
        raise ValueError(f"{destination} could not be written ({error}). Nothing is left of it; try again.") from error
    finally:
        if staged and os.path.isdir(staged):
            shutil.rmtree(staged, ignore_errors=True)
        elif staged and os.path.lexists(staged):
            staged.unlink()


def _check_places(source: Path, destination: Path) -> None:
    if not source.exists():
        raise ValueError(f"{source} does not exist. Give the folder of a checkpoint or a {PLAIN_SUFFIX} file.")
    if os.path.lexists(destination):
        raise ValueError(f"{destination} exists already, and nothing is overwritten. Give a new name, or remove it.")
    if not destination.parent.is_dir():
        raise ValueError(f"There is no folder {destination.parent} to write {destination.name} in. Create it first.")
    if source.is_file() and destination.suffix != PLAIN_SUFFIX:
        raise ValueError(f"{source} is a file, and so is the destination: {destination} must end in {PLAIN_SUFFIX}.")
    if source.resolve() in destination.resolve().parents:
        raise ValueError(f"{destination} lies within {source}, of which it would be a part. Give a place elsewhere.")

"""The files of a checkpoint: its tensors, read one by one, and the record that sparse training leaves beside them."""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from hf_admm.checkpoints.distributed_files import has_sharded_model, read_sharded, sharded_files, sharded_names
from hf_admm.sparsity.patterns import OWN, parse_pattern


WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
RECORD_NAME = "hf_admm.json"
RECORD_VERSION = 1

# What reading a file and taking its JSON apart may raise. Deep nesting exhausts the stack of the parser.
UNREADABLE = (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError)


@dataclass(frozen=True)
class SparsityRecord:
    """
    What a checkpoint says about its own sparsity.

    Args:
        pattern (`str`):
            The pattern that its targets obey.
        targets (`dict[str, bool]`):
            State dict keys of the sparse weights, and whether each is stored as `(in_features, out_features)`.
        kept (`dict[str, int]`, *optional*):
            How many of their entries may be non-zero, where the pattern (`own`) does not say.
    """

    pattern: str
    targets: dict[str, bool]
    kept: dict[str, int] = field(default_factory=dict)


def read_record(path: Path) -> SparsityRecord | None:
    """
    Reads the record of a checkpoint.

    Args:
        path (`Path`):
            The folder of the checkpoint, or its `model.safetensors`. Any other file, such as one shard, is not what a
            record beside it speaks of.

    Returns:
        [`SparsityRecord`], or `None` if there is none.

    Raises:
        `ValueError`: If the record cannot be understood.
    """
    if not path.is_dir() and path.name != WEIGHTS_NAME:
        return None
    file = (path if path.is_dir() else path.parent) / RECORD_NAME
    if not file.is_file():
        return None
    try:
        text = file.read_text(encoding="utf-8")
    except UNREADABLE as error:
        raise _damaged(file, error) from error
    return parse_record(text, str(file))


def parse_record(text: str, source: str) -> SparsityRecord:
    """
    Understands the JSON of a record.

    Args:
        text (`str`):
            The JSON.
        source (`str`):
            Where it is from, for messages.

    Returns:
        [`SparsityRecord`]

    Raises:
        `ValueError`: If the record cannot be understood.
    """
    try:
        content = json.loads(text)
        version = content["format_version"]
        if version == RECORD_VERSION:
            targets = {name: target["transposed"] for name, target in content["targets"].items()}
            for name, transposed in targets.items():
                name.encode()  # half a surrogate pair is legal JSON, and can't be printed
                if type(transposed) is not bool:
                    raise TypeError(f"'transposed' of {name} is {transposed!r}, neither true nor false")
            pattern, kept = str(parse_pattern(content["pattern"])), {}
            if pattern == OWN:
                kept = {name: target["kept"] for name, target in content["targets"].items()}
                if wrong := [name for name, count in kept.items() if type(count) is not int or count < 0]:
                    raise TypeError(f"'kept' of {', '.join(wrong)} is no number of entries")
            return SparsityRecord(pattern, targets, kept)
    except UNREADABLE as error:
        raise _damaged(source, error) from error
    raise ValueError(
        f"The sparsity record {source} has format version {version!r}, and this version of hf_admm reads "
        f"{RECORD_VERSION}. Upgrade hf_admm, or remove the record to audit the weights without it."
    )


def _damaged(source: str | Path, error: Exception) -> ValueError:
    return ValueError(
        f"The sparsity record {source} is damaged ({type(error).__name__}: {error}). Restore it, or remove it to "
        "audit the weights without a record."
    )


def has_weights(folder: Path) -> bool:
    """Whether a folder holds the weights of a model, in one of the forms that are read."""
    return (folder / WEIGHTS_NAME).is_file() or (folder / INDEX_NAME).is_file() or has_sharded_model(folder)


def _is_sharded(path: Path) -> bool:
    """Whether the weights of a checkpoint are in the shards of FSDP alone."""
    return has_sharded_model(path) and not ((path / WEIGHTS_NAME).is_file() or (path / INDEX_NAME).is_file())


def read_tensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """
    Reads the tensors of a checkpoint, one in memory at a time.

    Args:
        path (`Path`):
            A folder with `model.safetensors`, with an index and its shards, or with the shards of FSDP, or one
            `.safetensors` file.

    Yields:
        `tuple[str, torch.Tensor]`: State dict key and tensor.

    Raises:
        `ValueError`: If there are no safetensors, or a file is damaged or missing.
    """
    if _is_sharded(path):
        yield from read_sharded(path)
        return
    for file, names in weight_files(path).items():
        with _open(file) as tensors:
            for name in names if names is not None else tensors.keys():
                yield name, tensors.get_tensor(name)


def read_names(path: Path) -> set[str]:
    """
    The state dict keys of a checkpoint, without reading its tensors. They are not always the parameter names: some
    architectures (ViT, NomicBERT, Mixtral) are saved in their original format, renamed or with layers fused.

    Args:
        path (`Path`):
            A folder with `model.safetensors` or with an index and its shards, or one `.safetensors` file.

    Returns:
        `set[str]`: The keys.

    Raises:
        `ValueError`: If there are no safetensors, or a file is damaged or missing.
    """
    if _is_sharded(path):
        return set(sharded_names(path))
    found: set[str] = set()
    for file, names in weight_files(path).items():
        with _open(file) as tensors:
            found.update(names if names is not None else tensors.keys())
    return found


def read_some(path: Path, keys: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """
    Reads some of the tensors of a checkpoint in the order that they are asked for, one in memory at a time.

    Args:
        path (`Path`):
            A folder with `model.safetensors` or with an index and its shards, or one `.safetensors` file.
        keys (`Iterable[str]`):
            State dict keys of the checkpoint.

    Yields:
        `tuple[str, torch.Tensor]`: State dict key and tensor.

    Raises:
        `ValueError`: If there are no safetensors, or a file is damaged or missing.
    """
    if _is_sharded(path):
        yield from read_sharded(path, keys)
        return
    files = weight_files(path)
    places = {name: file for file, names in files.items() for name in names or ()}
    for key in keys:
        with _open(places.get(key) or next(iter(files))) as tensors:
            yield key, tensors.get_tensor(key)


@contextmanager
def _open(file: Path):
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is not a readable safetensors file ({error}). Copy or save it again.") from error


def weight_files(path: Path) -> dict[Path, list[str] | None]:
    """
    The files of a checkpoint's weights.

    Args:
        path (`Path`):
            Its folder, or one file.

    Returns:
        `dict[Path, list[str]]`: For each file the tensors to read from it, `None` for all of them. Shards of FSDP are
            not read by file: none.

    Raises:
        `ValueError`: If there are none, or the index is damaged or names files that are not there.
    """
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ValueError(
                f"{path} is not a safetensors file. Give a .safetensors or .onnx file, or the folder of a checkpoint."
            )
        return {path: None}
    if not path.is_dir():
        raise ValueError(f"{path} does not exist. Give the folder of a checkpoint or a .safetensors file.")
    if (path / WEIGHTS_NAME).is_file():  # as transformers does, which prefers it to an index
        return {path / WEIGHTS_NAME: None}
    if (path / INDEX_NAME).is_file():
        return _shards(path / INDEX_NAME)
    if has_sharded_model(path):
        return {file: [] for file in sharded_files(path)}
    found = [file.name for file in path.iterdir() if file.suffix in (".safetensors", ".bin", ".pt", ".pth", ".onnx")]
    found += [file.relative_to(path).as_posix() for file in path.glob(f"*/{WEIGHTS_NAME}")]
    raise ValueError(
        f"{path} holds neither {WEIGHTS_NAME} nor {INDEX_NAME} (weights found there: "
        f"{', '.join(sorted(found)) or 'none'}). Give the folder or file of one checkpoint. Only safetensors are "
        "read from a folder: load a model saved otherwise with from_pretrained and save it again with "
        "save_pretrained; name an .onnx file itself."
    )


def _shards(index: Path) -> dict[Path, list[str] | None]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards: dict[Path, list[str] | None] = {}
        for name, shard in weight_map.items():
            if not shard or Path(shard).name != shard:  # loading such an index would read any file of the machine
                raise ValueError(f"{shard!r}, the file of {name}, is not the plain name of a file beside it")
            shards.setdefault(index.parent / shard, []).append(name)
        missing = [shard.name for shard in shards if not shard.is_file()]
    except UNREADABLE as error:
        raise ValueError(f"The index {index} is damaged ({type(error).__name__}: {error}). Save it again.") from error
    if missing:
        raise ValueError(
            f"The index {index} names shards that are not there: {', '.join(missing)}. Copy them beside it."
        )
    return shards


def sync(path: Path) -> None:
    """Waits until a file or folder is on disk: a rename must not reach it before what it names."""
    if path.is_dir() and os.name != "posix":
        return
    # Windows syncs through a descriptor that may write, and no folders.
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Folders that `torch.distributed.checkpoint` has written, a file for each process, read without unpickling at large.

Its index, `.metadata`, is a pickle, which may run any code when torch reads it. Here nothing but what an index is made
of is looked up, so that a checkpoint from elsewhere can be looked into.
"""

import pickle
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import distributed


if distributed.is_available():
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
else:  # some builds of torch
    checkpoint = None

INDEX_OF_SHARDS = ".metadata"
# What accelerate names the folder of a model that FSDP has saved with `SHARDED_STATE_DICT`.
FSDP_MODEL_NAME = "pytorch_model_fsdp_0"
_MODEL_PREFIX = "model."  # before each name in it

_KNOWN = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
}
# What reading a damaged file, or one that is made up, may raise; `CheckpointException` is no `Exception`.
UNREADABLE_SHARDS = (Exception, CheckpointException) if checkpoint else (Exception,)


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _KNOWN.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        if module.startswith("pathlib") and name.endswith("Path"):  # where it was written, on any system
            return PurePosixPath
        raise pickle.UnpicklingError(f"{module}.{name} is no part of an index of shards")


def read_index(folder: Path) -> "Metadata":
    """
    Reads the index of a folder, and checks that what it names is there.

    Args:
        folder (`Path`):
            The folder.

    Returns:
        `torch.distributed.checkpoint.metadata.Metadata`

    Raises:
        `ValueError`: If the index can't be read, or a file that it names is missing or too short. It is the reason
            alone, for a message.
    """
    if checkpoint is None:
        raise ValueError("this build of torch has no torch.distributed to read shards with")
    try:
        with open(folder / INDEX_OF_SHARDS, "rb") as file:
            index = _IndexUnpickler(file).load()
        ends: dict[str, int] = {}
        for place in index.storage_data.values():
            name = place.relative_path
            if Path(name).name != name:  # reading such an index would read any file of the machine
                raise ValueError(f"{name!r} is not the plain name of a file beside it")
            ends[name] = max(ends.get(name, 0), place.offset + place.length)
        for found in index.state_dict_metadata.values():
            if isinstance(found, TensorStorageMetadata):
                _check_chunks(found)
    except Exception as error:
        raise ValueError(f"{INDEX_OF_SHARDS}: {type(error).__name__}: {error}") from None
    if missing := sorted(name for name in ends if not (folder / name).is_file()):
        raise ValueError(f"missing: {', '.join(missing)}")
    if short := sorted(name for name, end in ends.items() if (folder / name).stat().st_size < end):
        raise ValueError(f"cut off: {', '.join(short)}")
    return index


def _check_chunks(found: "TensorStorageMetadata") -> None:
    """Chunks lie within their tensor and have as many entries: torch would leave what none covers as it was."""
    entries = 0
    for chunk in found.chunks:
        if any(at < 0 or at + side > whole for at, side, whole in
               zip(chunk.offsets, chunk.sizes, found.size, strict=True)):  # fmt: skip
            raise ValueError("a chunk lies outside of its tensor")
        entries += torch.Size(chunk.sizes).numel()
    if entries != torch.Size(found.size).numel():
        raise ValueError(f"chunks have {entries} of the {torch.Size(found.size).numel()} entries of a tensor")


def save_shards(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """
    Writes tensors, each process its own shards. Every process must call it.

    Args:
        tensors (`dict[str, torch.Tensor]`):
            `DTensor`s, of which each process writes its part, or tensors that every process holds, written once.
        folder (`Path`):
            Where to.

    Raises:
        `OSError`: On every process, if one of them could not write.
    """
    writer = checkpoint.FileSystemWriter(folder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that one process is alone
            checkpoint.save(tensors, storage_writer=writer)
    except CheckpointException as error:
        raise OSError(f"The shards of {folder} could not be written: {_reasons(error)}") from error


def load_shards(tensors: dict[str, torch.Tensor], folder: Path, index: "Metadata", alone: bool = False) -> None:
    """
    Reads tensors in place, each process what it holds of them. Every process must call it, unless it reads alone.

    Args:
        tensors (`dict[str, torch.Tensor]`):
            As for [`save_shards`], divided in whatever way.
        folder (`Path`):
            Where from.
        index (`torch.distributed.checkpoint.metadata.Metadata`):
            What [`read_index`] returned.
        alone (`bool`, *optional*, defaults to `False`):
            Whether this process reads for itself, whatever others do.

    Raises:
        `ValueError`: If they can't be read, with the reason alone.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            if alone:  # the public function of older releases always asks the others
                _load_state_dict(tensors, storage_reader=_reader(folder, index), no_dist=True)
            else:
                checkpoint.load(tensors, storage_reader=_reader(folder, index))
    except UNREADABLE_SHARDS as error:
        raise ValueError(_reasons(error)) from error


def _reader(folder: Path, index: "Metadata") -> Any:
    class Reader(checkpoint.FileSystemReader):
        def read_metadata(self, *args, **kwargs):
            return index

    return Reader(folder)


def _reasons(error: BaseException) -> str:
    """Of each process that failed, without the traces."""
    failures = getattr(error, "failures", None) or {}
    found = {f"{type(failure[0]).__name__}: {failure[0]}" for failure in failures.values()}
    return "; ".join(sorted(found)) or f"{type(error).__name__}: {error}"


# ---- The sharded model of a checkpoint ----


def has_sharded_model(folder: Path) -> bool:
    """Whether a checkpoint holds a model in the shards of FSDP."""
    return (folder / FSDP_MODEL_NAME / INDEX_OF_SHARDS).is_file()


def sharded_files(folder: Path) -> list[Path]:
    """The files of a checkpoint's sharded model."""
    return sorted((folder / FSDP_MODEL_NAME).glob("*.distcp"))


def sharded_names(folder: Path) -> list[str]:
    """The names of the tensors of a checkpoint's sharded model."""
    return list(_sharded_model(folder)[1])


def read_sharded(folder: Path, names: Iterable[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """
    Reads tensors of a checkpoint's sharded model, one in memory at a time.

    Args:
        folder (`Path`):
            The folder of the checkpoint.
        names (`Iterable[str]`, *optional*):
            Which, in this order; all by default.

    Yields:
        `tuple[str, torch.Tensor]`: Name and whole tensor.

    Raises:
        `ValueError`: If the shards are damaged.
    """
    index, keys = _sharded_model(folder)
    for name in keys if names is None else names:
        key = keys[name]
        found = index.state_dict_metadata[key]
        tensors = {key: torch.empty(found.size, dtype=found.properties.dtype)}
        try:
            load_shards(tensors, folder / FSDP_MODEL_NAME, index, alone=True)
        except ValueError as error:
            raise _unreadable(folder, error) from error
        yield name, tensors[key]


def _sharded_model(folder: Path) -> tuple["Metadata", dict[str, str]]:
    try:
        index = read_index(folder / FSDP_MODEL_NAME)
    except ValueError as error:
        raise _unreadable(folder, error) from error
    tensors = [key for key, found in index.state_dict_metadata.items() if isinstance(found, TensorStorageMetadata)]
    return index, {key.removeprefix(_MODEL_PREFIX): key for key in tensors}


def _unreadable(folder: Path, error: ValueError) -> ValueError:
    return ValueError(f"{folder / FSDP_MODEL_NAME} can't be read as the shards of a model ({error}). Copy it again.")

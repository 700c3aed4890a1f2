"""A checkpoint of one or several parts: their tensors by one name each, and what the records say of them."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from hf_admm.checkpoints.files import (
    UNREADABLE,
    SparsityRecord,
    has_weights,
    read_record,
    read_tensors,
)


# Sentence Transformers: a checkpoint of several modules, with the weights of each in a folder or at the root.
MODULES_NAME = "modules.json"


class StoredWeight(NamedTuple):
    """
    A tensor of a file.

    Args:
        name (`str`):
            Its state dict key.
        tensor (`torch.Tensor`):
            The tensor as stored.
        recorded (`bool`):
            Whether the record names it as sparse.
        transposed (`bool`, *optional*):
            Whether it is stored as `(in_features, out_features)`. `None` if nothing says so.
    """

    name: str
    tensor: torch.Tensor
    recorded: bool
    transposed: bool | None


@dataclass
class Checkpoint:
    """
    The parts of a checkpoint, each with its weights, and the records at the root and beside the weights.

    Args:
        path (`Path`):
            Its folder, or one file.
        folders (`list[Path]`):
            Where the weights lie.
        records (`dict[Path, SparsityRecord]`):
            The records, by the folder that holds them.
        unseen (`list[str]`):
            What the records name and no part holds, once all of [`Checkpoint.tensors`] were read.
        kept (`dict[str, int]`, *optional*):
            How many entries of each weight that was read so far may be non-zero, where a record says so.
    """

    path: Path
    folders: list[Path]
    records: dict[Path, SparsityRecord]
    unseen: list[str] = field(default_factory=list)
    kept: dict[str, int] = field(default_factory=dict)

    @classmethod
    def find(cls, path: Path) -> "Checkpoint":
        """Looks for the parts and reads the records."""
        folders = weight_folders(path)
        records = {place: read_record(place) for place in dict.fromkeys([path, *folders])}
        return cls(path, folders, {place: record for place, record in records.items() if record})

    @property
    def pattern(self) -> str | None:
        """The pattern that is recorded."""
        return next((record.pattern for record in self.records.values()), None)

    @property
    def recorded(self) -> int | None:
        """How many weights the records name, `None` if there is no record."""
        return sum(len(record.targets) for record in self.records.values()) if self.records else None

    def tensors(self) -> Iterator[StoredWeight]:
        """The tensors, one in memory at a time."""
        unseen = {(place, name) for place, record in self.records.items() for name in record.targets}
        for folder in self.folders:
            prefix = "" if folder == self.path or len(self.folders) == 1 else f"{folder.name}/"
            for name, tensor in read_tensors(folder):
                # Beside the weights, a record names their keys; at the root perhaps with the folder before them.
                keys = [(folder, name), (self.path, name), (self.path, f"{folder.name}/{name}")]
                found = [key for key in keys if key[0] in self.records and key[1] in self.records[key[0]].targets]
                unseen.difference_update(found)
                for place, key in found:
                    if key in self.records[place].kept:
                        self.kept[prefix + name] = self.records[place].kept[key]
                transposed = self.records[found[0][0]].targets[found[0][1]] if found else None
                yield StoredWeight(prefix + name, tensor, bool(found), transposed)
        self.unseen = [name for record in self.records.values() for name in record.targets
                       if any(key == name for _, key in unseen)]  # fmt: skip


def weight_folders(path: Path) -> list[Path]:
    """
    Where the weights of a checkpoint lie: in its folder, or in folders of that one for each of its parts.

    Args:
        path (`Path`):
            The folder of a checkpoint, or one file, which stands for itself.

    Returns:
        `list[Path]`: The folder itself if it holds weights, and those of the modules that Sentence Transformers lists
            there. Else all of its folders with weights, unless one of them is a checkpoint of its own.

    Raises:
        `ValueError`: If `modules.json` is damaged.
    """
    if not path.is_dir():
        return [path]
    inside = sorted(folder for folder in path.iterdir() if folder.is_dir() and has_weights(folder))
    listed = path / MODULES_NAME
    if listed.is_file():
        try:
            modules = {module["path"] for module in json.loads(listed.read_text(encoding="utf-8"))}
        except UNREADABLE as error:
            raise ValueError(f"{listed} is damaged ({type(error).__name__}: {error}). Save it again.") from error
        inside = [folder for folder in inside if folder.name in modules]
    elif has_weights(path) or any(folder.name.startswith("checkpoint-") for folder in inside):
        inside = []
    return [path, *inside] if has_weights(path) or not inside else inside

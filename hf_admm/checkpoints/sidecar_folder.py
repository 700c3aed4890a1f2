"""The sidecar as a folder of shards: each process writes what it holds, and no tensor is ever whole in one place.

`torch.distributed.checkpoint` writes and reads the shards, so that any number of processes, or one without a process
group, can resume. A header beside them carries the settings and a checksum of each file. The folder is written under a
temporary name and renamed: whenever a run is killed, there is a whole one, or none where none was.
"""

import json
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from hf_admm.checkpoints.distributed_files import INDEX_OF_SHARDS, load_shards, read_index, save_shards
from hf_admm.checkpoints.files import UNREADABLE, sync
from hf_admm.checkpoints.shard_layouts import empty_like_part, mask_from_rows, mask_to_rows, rows_of_mask, spread
from hf_admm.checkpoints.sidecar_settings import (
    SHARDED_SIDECAR_NAME,
    SIDECAR_NAME,
    breaks_pattern,
    check_tensors,
    checksum,
    damaged,
    describe,
    diverged,
    is_finite,
    understand,
)
from hf_admm.checkpoints.together import rank_and_count, together
from hf_admm.pruning.phases import Phase
from hf_admm.pruning.shards import gather, local, straddles
from hf_admm.pruning.state import ADMMState
from hf_admm.pruning.succession import PHASES
from hf_admm.pruning.weights import PrunedWeights
from hf_admm.sparsity.masks import pack_mask
from hf_admm.sparsity.patterns import OwnPattern
from hf_admm.sparsity.projections import kept_range
from hf_admm.sparsity.targets import named_parameters


HEADER_NAME = "header.json"
_TEMPORARY, _REPLACED = f"{SHARDED_SIDECAR_NAME}.tmp", f"{SHARDED_SIDECAR_NAME}.replaced"
_AT_ONCE = 1 << 24  # bytes

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class SidecarFolder:
    """
    A sidecar of this form.

    Args:
        path (`Path`):
            The folder of the shards.
    """

    def __init__(self, path: Path):
        self.path = path

    @classmethod
    def find(cls, folder: Path) -> "SidecarFolder | None":
        """That of a checkpoint, if it has one: the old one, if a run was killed as it was about to be replaced."""
        places = (folder / SHARDED_SIDECAR_NAME, folder / _REPLACED)
        return next((cls(place) for place in places if place.is_dir()), None)

    @property
    def written_at(self) -> int:
        """When, to compare."""
        header = self.path / HEADER_NAME
        return (header if header.is_file() else self.path).stat().st_mtime_ns

    @classmethod
    def save(cls, state: ADMMState, folder: Path, write: bool = True) -> None:
        """Writes it, see [`sidecar.save_sidecar`]."""
        rank, _ = rank_and_count()
        temporary = folder / _TEMPORARY
        together(lambda: shutil.rmtree(temporary, ignore_errors=True) if rank == 0 else None)
        save_shards(_tensors_of(state), temporary)
        # What can be read is what counts, so each process reads what it has written.
        written = [*temporary.glob(f"__{rank}_*"), *([temporary / INDEX_OF_SHARDS] if rank == 0 else [])]
        sums = together(lambda: {file.name: _sum_of(file) for file in written})
        files = {name: found for mine in sums for name, found in mine.items()}
        together(lambda: _publish(folder, describe(state), files) if rank == 0 else None)

    @staticmethod
    def remove(folder: Path) -> None:
        """Removes what an earlier save has left in a checkpoint."""
        for name in (SHARDED_SIDECAR_NAME, _REPLACED, _TEMPORARY):
            shutil.rmtree(folder / name, ignore_errors=True)

    @cached_property
    def header(self) -> dict:
        """The text of the settings, and size and checksum of each file."""
        try:
            header = json.loads((self.path / HEADER_NAME).read_text(encoding="utf-8"))
            text, files = header["hf_admm"], header["files"]
            if header["crc32"] != checksum(text + json.dumps(files), ()):
                raise ValueError("its checksum is not the one that is recorded")
            wrong = [name for name, (size, _) in files.items() if _size(self.path / name) != size]
        except UNREADABLE as error:
            raise damaged(self.path, f"{HEADER_NAME}: {type(error).__name__}: {error}") from None
        if wrong:
            raise damaged(self.path, f"missing or of another size: {', '.join(sorted(wrong))}")
        return header

    def settings(self) -> dict:
        """What it says of the run."""
        return understand(self.header["hf_admm"], self.path)

    @cached_property
    def index(self) -> Any:
        """What torch knows of the shards."""
        try:
            if self.header["files"].get(INDEX_OF_SHARDS) != _sum_of(self.path / INDEX_OF_SHARDS):
                raise ValueError(f"{INDEX_OF_SHARDS} is not the one that was saved")
            return read_index(self.path)
        except (OSError, ValueError) as error:
            raise damaged(self.path, error) from None

    def check_tensors(self, settings: dict) -> None:
        """Whether it holds what the settings speak of, by its header and the index of the shards."""
        tensors = {key: tensor for key, tensor in self.index.state_dict_metadata.items() if hasattr(tensor, "size")}
        found = {
            key: (_DTYPES.get(tensor.properties.dtype, str(tensor.properties.dtype)), list(tensor.size))
            for key, tensor in tensors.items()
        }
        masks = {}
        for name, shape in settings["targets"].items():
            rows = rows_of_mask(torch.Size(shape))
            masks[name] = [("BOOL", shape), *([("U8", rows)] if rows else [])]
        check_tensors(self.path, settings, found, masks)

    @contextmanager
    def opened(self, settings: dict, weights: PrunedWeights) -> Iterator["_Parts"]:
        """Reads this process's parts, checks the values of all, and gives the parts within it."""
        self._check_sums()
        yield self._read(settings, weights)

    def _check_sums(self) -> None:
        """Each process reads some of the files, so that all of them are read once."""
        rank, count = rank_and_count()
        files = sorted(self.header["files"].items())[rank::count]
        try:
            found = together(lambda: [name for name, recorded in files if _sum_of(self.path / name) != recorded])
        except OSError as error:
            raise damaged(self.path, error) from None
        if changed := sorted(name for names in found for name in names):
            raise damaged(self.path, f"not what was saved: {', '.join(changed)}")

    def _read(self, settings: dict, weights: PrunedWeights) -> "_Parts":
        phase = PHASES[settings["phase"]]
        live, tensors = named_parameters(weights.model), {}
        for name in settings["targets"]:
            for kind in phase.kinds():
                key = f"{kind}/{name}"
                tensors[key] = self._room(key, live[name])
        for name in settings["others"]:
            tensors[f"other/{name}"] = self._room(f"other/{name}", live[name])
        try:
            load_shards(tensors, self.path, self.index)
        except ValueError as error:
            raise damaged(self.path, error) from error
        parts = _Parts(self, {key: local(tensor) for key, tensor in tensors.items()})
        self._check_values(parts, settings, weights, phase.companion)
        return parts

    def _room(self, key: str, parameter: torch.Tensor) -> torch.Tensor:
        found = self.index.state_dict_metadata[key]
        return empty_like_part(parameter, found.size, found.properties.dtype)

    def _check_values(self, parts: "_Parts", settings: dict, weights: PrunedWeights, companion: str | None) -> None:
        """Whether training can go on with them. Each process judges its parts, and all come to the same end."""
        not_finite, astray, kept = [], [], {}
        for key, part in parts.tensors.items():
            if not key.startswith("mask/") and not is_finite(part):
                not_finite.append(key)
        for name in settings["targets"] if companion == "mask" else ():
            parameter, transposed = weights.parameters[name], weights.targets[name].transposed
            mask = parts.mask(name, parameter)
            if isinstance(weights.pattern, OwnPattern):
                if ((parts.tensors[f"weight/{name}"] != 0) & ~mask).any():
                    astray.append(f"weight/{name}")
                continue
            if straddles(parameter, weights.pattern, transposed):
                mask = gather(mask, parameter)
            kept[name] = kept_range(mask, weights.pattern, transposed)
        found = together(lambda: (not_finite, astray, kept))
        if names := sorted({name for _, astray, _ in found for name in astray}):
            raise damaged(self.path, f"{', '.join(names)} has entries outside of its mask")
        for name in kept:
            ranges = [kept[name] for _, _, kept in found if kept[name] is not None]
            everywhere = (min(low for low, _ in ranges), max(high for _, high in ranges)) if ranges else None
            if breaks_pattern(everywhere, weights.pattern, torch.Size(settings["targets"][name])):
                raise damaged(self.path, f"mask/{name} breaks pattern {weights.pattern}")
        if keys := sorted({key for not_finite, _, _ in found for key in not_finite}):
            raise diverged(self.path, keys)


class _Parts:
    """This process's parts of the tensors, in CPU memory."""

    def __init__(self, sidecar: SidecarFolder, tensors: Mapping[str, torch.Tensor]):
        self.sidecar, self.tensors = sidecar, tensors

    def weight(self, key: str, parameter: torch.Tensor) -> torch.Tensor:
        return self.tensors[key]

    def mask(self, name: str, parameter: torch.Tensor) -> torch.Tensor:
        return mask_from_rows(self.tensors[f"mask/{name}"], parameter)

    def companion(self, phase: Phase, name: str) -> torch.Tensor:
        if phase.companion != "mask":
            return self.tensors[f"{phase.companion}/{name}"]
        return pack_mask(self.mask(name, phase.weights.parameters[name]))


def _tensors_of(state: ADMMState) -> dict[str, torch.Tensor]:
    """All that a sidecar holds, as tensors that are divided as their weights are."""
    tensors, phase, weights = {}, state.phase, state.weights
    for name, part in weights.dense():
        parameter = weights.parameters[name]
        tensors[f"weight/{name}"] = spread(part, parameter)
        if phase.companion == "mask":
            tensors[f"mask/{name}"] = mask_to_rows(phase.companions[name], parameter)
        elif phase.companion:
            tensors[f"{phase.companion}/{name}"] = spread(phase.companions[name], parameter)
    for name, (part, parameter) in state.other_weights().items():
        tensors[f"other/{name}"] = spread(part, parameter)
    return tensors


def _publish(folder: Path, text: str, files: dict[str, list]) -> None:
    """Gives the folder its name, once all of it is on disk."""
    temporary, final, replaced = folder / _TEMPORARY, folder / SHARDED_SIDECAR_NAME, folder / _REPLACED
    if unseen := [name for name in files if not (temporary / name).is_file()]:
        raise OSError(
            f"{folder} is not the same folder for all processes: the first one does not see "
            f"{', '.join(sorted(unseen))}. Give an output_dir that all machines share, or set FSDP's state_dict_type "
            "to FULL_STATE_DICT."
        )
    header = {"hf_admm": text, "files": files, "crc32": checksum(text + json.dumps(files), ())}
    (temporary / HEADER_NAME).write_text(json.dumps(header), encoding="utf-8")
    sync(temporary / HEADER_NAME)
    sync(temporary)
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.replace(final, replaced)
    os.replace(temporary, final)
    sync(folder)
    shutil.rmtree(replaced, ignore_errors=True)
    (folder / SIDECAR_NAME).unlink(missing_ok=True)  # the other form, of an earlier save here


def _size(file: Path) -> int | None:
    return file.stat().st_size if file.is_file() else None


def _sum_of(file: Path) -> list:
    """Size and CRC-32 of a file."""
    size = value = 0
    with open(file, "rb") as content:
        while read := content.read(_AT_ONCE):
            size, value = size + len(read), zlib.crc32(read, value)
    return [size, f"{value:08x}"]

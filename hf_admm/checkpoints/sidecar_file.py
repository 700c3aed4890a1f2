"""The sidecar as one file of whole tensors, the same whatever the number of processes.

It is a safetensors file whose header carries the settings, written to a temporary name and renamed: it is either whole
or not there. A checksum over all of it tells a flipped bit, which would be trained on in silence.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hf_admm.checkpoints.sidecar_folder import SidecarFolder
from hf_admm.checkpoints.sidecar_settings import (
    SIDECAR_NAME,
    breaks_pattern,
    check_tensors,
    checksum,
    damaged,
    describe,
    diverged,
    is_finite,
    packed_bytes,
    understand,
)
from hf_admm.pruning.phases import Phase
from hf_admm.pruning.shards import DTensor, gather, scatter
from hf_admm.pruning.state import ADMMState
from hf_admm.pruning.weights import PrunedWeights
from hf_admm.sparsity.masks import unpack_mask
from hf_admm.sparsity.patterns import OwnPattern
from hf_admm.sparsity.projections import kept_range


class SidecarFile:
    """
    A sidecar of this form.

    Args:
        path (`Path`):
            The file.
    """

    def __init__(self, path: Path):
        self.path = path

    @classmethod
    def find(cls, folder: Path) -> "SidecarFile | None":
        """That of a checkpoint, if it has one."""
        return cls(folder / SIDECAR_NAME) if (folder / SIDECAR_NAME).is_file() else None

    @property
    def written_at(self) -> int:
        """When, to compare."""
        return self.path.stat().st_mtime_ns

    @classmethod
    def save(cls, state: ADMMState, folder: Path, write: bool) -> None:
        """Writes it, see [`sidecar.save_sidecar`]."""
        tensors, phase, weights = {}, state.phase, state.weights

        def take(key: str, whole: torch.Tensor, parameter: torch.Tensor) -> None:
            if write:  # gathered tensors are taken off the device one by one
                tensors[key] = _for_file(whole, parameter)

        for name, part in weights.dense():
            parameter = weights.parameters[name]
            take(f"weight/{name}", gather(part, parameter), parameter)
            if phase.companion:
                companion = phase.whole_companion(name, phase.companions[name])
                take(f"{phase.companion}/{name}", companion, parameter)
        for name, (part, parameter) in state.other_weights().items():
            take(f"other/{name}", gather(part, parameter), parameter)
        if not write:
            return
        path = folder / SIDECAR_NAME
        temporary = path.with_suffix(".tmp")
        text = describe(state)
        save_file(tensors, temporary, metadata={"hf_admm": text, "crc32": checksum(text, sorted(tensors.items()))})
        os.replace(temporary, path)
        SidecarFolder.remove(folder)

    def settings(self) -> dict:
        """What it says of the run."""
        with _open(self.path) as file:
            metadata = file.metadata() or {}
        return understand(metadata.get("hf_admm"), self.path)

    def check_tensors(self, settings: dict) -> None:
        """Whether it holds what the settings speak of, by its header."""
        with _open(self.path) as file:
            headers = {key: file.get_slice(key) for key in file.keys()}
            found = {key: (header.get_dtype(), list(header.get_shape())) for key, header in headers.items()}
        masks = {name: [("U8", [packed_bytes(shape)])] for name, shape in settings["targets"].items()}
        check_tensors(self.path, settings, found, masks)

    @contextmanager
    def opened(self, settings: dict, weights: PrunedWeights) -> Iterator["_Parts"]:
        """Checks the values, and gives this process's parts of the tensors within it."""
        with _open(self.path) as file:
            self._check_values(file, weights)
            yield _Parts(file)

    def _check_values(self, file, weights: PrunedWeights) -> None:
        """Whether the tensors are the ones that were saved, and such that training can go on with them."""
        metadata, keys = file.metadata(), sorted(file.keys())
        found = checksum(metadata["hf_admm"], ((key, file.get_tensor(key)) for key in keys))
        if metadata.get("crc32") != found:
            raise damaged(self.path, f"its checksum is {found}, and {metadata.get('crc32')} is recorded")
        not_finite = []
        for key in keys:
            kind, name = key.split("/", 1)
            tensor = file.get_tensor(key)
            if kind == "mask":
                target = weights.targets[name]
                mask = unpack_mask(tensor, torch.Size(target.shape))
                if isinstance(weights.pattern, OwnPattern):
                    if ((file.get_tensor(f"weight/{name}") != 0) & ~mask).any():
                        raise damaged(self.path, f"weight/{name} has entries outside of its mask")
                    continue
                if breaks_pattern(kept_range(mask, weights.pattern, target.transposed), weights.pattern, mask.shape):
                    raise damaged(self.path, f"{key} breaks pattern {weights.pattern}")
            elif not is_finite(tensor):
                not_finite.append(key)
        if not_finite:
            raise diverged(self.path, not_finite)


class _Parts:
    """This process's parts of the tensors of an open file."""

    def __init__(self, file):
        self.file = file

    def weight(self, key: str, parameter: torch.Tensor) -> torch.Tensor:
        return scatter(self.file.get_tensor(key).to(_device(parameter)), parameter)

    def companion(self, phase: Phase, name: str) -> torch.Tensor:
        return phase.part_of_companion(name, self.file.get_tensor(f"{phase.companion}/{name}"))


def _device(parameter: torch.Tensor) -> torch.device:
    return parameter.to_local().device if isinstance(parameter, DTensor) else parameter.device


def _for_file(whole: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    return (whole.cpu() if isinstance(parameter, DTensor) else whole).contiguous()


@contextmanager
def _open(path: Path) -> Iterator:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise damaged(path, error) from None

"""The sidecar of a checkpoint: the dense working weights and the anchors or masks that an exact resume needs.

`model.safetensors` beside it holds the sparse weights, so any checkpoint loads anywhere; only a resume reads this
file. It is one safetensors file whose header carries the settings, written to a temporary name and renamed: it is
either whole or not there. A checksum over all of it tells a flipped bit, which would be trained on in silence.
"""

import json
import math
import os
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hf_admm.pruning.phases import PhaseSettings
from hf_admm.pruning.shards import DTensor, gather, local, scatter
from hf_admm.pruning.state import PHASES, ADMMState
from hf_admm.pruning.weights import PrunedWeights
from hf_admm.sparsity.masks import unpack_mask
from hf_admm.sparsity.patterns import OwnPattern, SparsityPattern
from hf_admm.sparsity.projections import kept_per_group, to_groups
from hf_admm.sparsity.targets import Target, named_parameters


SIDECAR_NAME = "admm_state.safetensors"
FORMAT_VERSION = 3

# Each setting with what it may be. Figures are floats as JSON has them, NaN included.
_SETTINGS = {
    "pattern": lambda value: type(value) is str,
    "phase": lambda value: type(value) is str and value in PHASES,
    "rho": lambda value: type(value) in (int, float) and 0 <= value <= 1e30,
    "updated_at": lambda value: type(value) is int and value >= 0,
    "figures": lambda value: type(value) is dict and all(type(figure) is float for figure in value.values()),
    "targets": lambda value: type(value) is dict and all(map(_is_matrix, value.values())),
    "released": lambda value: type(value) is dict and all(type(reason) is str for reason in value.values()),
    "others": lambda value: type(value) is dict and all(map(_is_shape, value.values())),
}
# As safetensors names them: weights are of any precision that is trained in; masks are packed, a bit an entry.
_FLOATS = ("F64", "F32", "F16", "BF16")
_DTYPES = {"weight": _FLOATS, "other": _FLOATS, "anchor": ("F32", "BF16"), "mask": ("U8",)}


def save_sidecar(state: ADMMState, folder: str | os.PathLike, write: bool = True) -> None:
    """
    Writes the sidecar of a checkpoint: whole tensors, whatever the number of processes. Every process must call it.

    Args:
        state ([`ADMMState`]):
            The state.
        folder (`str` or `os.PathLike`):
            The checkpoint's folder.
        write (`bool`, *optional*, defaults to `True`):
            Whether this process writes the file, or only gives the others its shards.
    """
    tensors, phase, weights = {}, state.phase, state.weights
    for name, part in weights.dense():
        parameter = weights.parameters[name]
        for kind, whole in (
            ("weight", gather(part, parameter)),
            (phase.companion, phase.whole_companion(name, phase.companions[name])),
        ):
            if write:  # gathered tensors are taken off the device one by one
                tensors[f"{kind}/{name}"] = (whole.cpu() if isinstance(parameter, DTensor) else whole).contiguous()
    others = state.other_weights()
    for name, (part, parameter) in others.items():
        whole = gather(part, parameter)
        if write:
            tensors[f"other/{name}"] = (whole.cpu() if isinstance(parameter, DTensor) else whole).contiguous()
    if not write:
        return
    settings = {
        "format_version": FORMAT_VERSION,
        "pattern": str(weights.pattern),
        "phase": phase.name,
        "rho": phase.rho,
        "updated_at": phase.updated_at,
        "figures": {name: float(figure) for name, figure in phase.figures.items()},
        "targets": {name: list(target.shape) for name, target in weights.targets.items()},
        "released": weights.released,
        "others": {name: list(parameter.shape) for name, (_, parameter) in others.items()},
    }
    path = Path(folder) / SIDECAR_NAME
    temporary = path.with_suffix(".tmp")
    text = json.dumps(settings)
    save_file(tensors, temporary, metadata={"hf_admm": text, "crc32": checksum(text, sorted(tensors.items()))})
    os.replace(temporary, path)


def has_sidecar(folder: str | os.PathLike, pattern: SparsityPattern | None, targets: dict[str, Target]) -> bool:
    """
    Whether a resume has a sidecar to read: not where all that was sparse is frozen, as under adapters.

    Args:
        folder, pattern, targets:
            As for [`check_sidecar`].
    """
    return bool(targets) or not isinstance(pattern, OwnPattern) or (Path(folder) / SIDECAR_NAME).is_file()


def check_sidecar(folder: str | os.PathLike, pattern: SparsityPattern | None, targets: dict[str, Target]) -> None:
    """
    Checks that a checkpoint can be resumed with these settings, from the header of its sidecar alone.

    Args:
        folder (`str` or `os.PathLike`):
            The checkpoint's folder.
        pattern ([`SparsityPattern`], *optional*):
            The pattern of this run; `None` for a dense run.
        targets (`dict[str, Target]`):
            The targets of this run.

    Raises:
        `ValueError`: If the sidecar is missing or damaged, or its pattern, targets or their shapes differ.
    """
    path = Path(folder) / SIDECAR_NAME
    if pattern is None:
        if path.is_file():
            raise ValueError(
                f"{folder} is a checkpoint of a sparse run (pattern {_settings(path)['pattern']}), this run has "
                "sparsity_pattern='none'. Resume with the checkpoint's pattern, or start a new run from its weights "
                "with from_pretrained."
            )
        return
    if not path.is_file():
        raise ValueError(
            f"{folder} has no {SIDECAR_NAME}, the dense weights and dual variables that an exact resume needs: it was "
            "saved with save_only_model=True, or by a dense run. Resume from a full checkpoint, or start a new run "
            "from its weights with from_pretrained."
        )
    settings = _settings(path)
    if settings["pattern"] != str(pattern):
        raise ValueError(
            f"{folder} was trained with sparsity_pattern={settings['pattern']!r}, this run has {str(pattern)!r}. "
            "Resume with the checkpoint's pattern, or start a new run from its weights with from_pretrained."
        )
    # What was left dense in the run may be a target of this one, whose callbacks have not come to it yet.
    gone = ", ".join(sorted(set(settings["targets"]) - set(targets)))
    new = ", ".join(sorted(set(targets) - set(settings["targets"]) - set(settings["released"])))
    if gone or new:
        raise ValueError(
            f"{folder} was trained with other targets. In the checkpoint only: {gone or 'none'}. In this run only: "
            f"{new or 'none'}. Resume with the checkpoint's sparsity_include and sparsity_exclude."
        )
    reshaped = [name for name, shape in settings["targets"].items() if list(targets[name].shape) != shape]
    if reshaped:
        raise ValueError(
            f"{folder} was trained with other shapes of: {', '.join(reshaped)}. Resume with the model that the "
            "checkpoint was trained from."
        )
    _check_tensors(path, settings)


@torch.no_grad()
def load_sidecar(state: ADMMState, folder: str | os.PathLike, settings: PhaseSettings) -> None:
    """
    Restores a state and the dense weights of its model, in place.

    Args:
        state ([`ADMMState`]):
            A state that was `reset` on the live model.
        folder (`str` or `os.PathLike`):
            The checkpoint's folder.
        settings ([`PhaseSettings`]):
            Those of this run.

    Raises:
        `ValueError`: If the sidecar does not fit, see [`check_sidecar`], or its values are damaged or not finite. The
            model and the state are then as they were.
    """
    weights = state.weights
    check_sidecar(folder, weights.pattern, weights.targets)
    state.swapped.trains()  # what is copied into the model now is what is trained
    path = Path(folder) / SIDECAR_NAME
    saved = _settings(path)
    with _open(path) as file:
        _check_values(path, file, weights)
        for name, reason in saved["released"].items():
            weights.released[name] = reason
            if name in weights.targets:
                weights.release(name, reason)
        phase = PHASES[saved["phase"]](weights, settings)
        for name, part in weights.local():
            part.copy_(scatter(file.get_tensor(f"weight/{name}").to(part.device), weights.parameters[name]))
            phase.restore(name, file.get_tensor(f"{phase.companion}/{name}"))
        parameters = named_parameters(weights.model)
        for name in saved["others"]:
            part = local(parameters[name].detach())
            part.copy_(scatter(file.get_tensor(f"other/{name}").to(part.device), parameters[name]))
    phase.rho, phase.updated_at, phase.figures = saved["rho"], saved["updated_at"], saved["figures"]
    state.phase, state.resumed = phase, True


def _settings(path: Path) -> dict:
    with _open(path) as file:
        metadata = file.metadata() or {}
    try:
        settings = json.loads(metadata["hf_admm"])
        version = settings["format_version"]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise _damaged(path, error) from None
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {version!r}, this release reads {FORMAT_VERSION}. Resume with the release "
            "that wrote it."
        )
    if wrong := [name for name, valid in _SETTINGS.items() if not valid(settings.get(name))]:
        raise _damaged(path, f"wrong or missing: {', '.join(wrong)}")
    if both := settings["targets"].keys() & settings["released"].keys():
        raise _damaged(path, f"both pruned and left dense: {', '.join(sorted(both))}")
    return settings


def _is_shape(value) -> bool:
    return type(value) is list and all(type(side) is int for side in value)


def _is_matrix(value) -> bool:
    return _is_shape(value) and len(value) >= 2


def _check_tensors(path: Path, settings: dict) -> None:
    """Whether every target has its tensors, of the right shape and dtype, and nothing else is there."""
    kinds = ("weight", PHASES[settings["phase"]].companion)
    expected = {f"{kind}/{name}": (kind, shape) for kind in kinds for name, shape in settings["targets"].items()}
    expected |= {f"other/{name}": ("other", shape) for name, shape in settings["others"].items()}
    with _open(path) as file:
        keys = set(file.keys())
        wrong = keys ^ expected.keys()
        for key in keys & expected.keys():
            kind, shape = expected[key]
            if kind == "mask":
                shape = [-(-math.prod(shape) // 8)]
            header = file.get_slice(key)
            if header.get_dtype() not in _DTYPES[kind] or list(header.get_shape()) != shape:
                wrong.add(key)
    if wrong:
        raise _damaged(
            path, f"tensors missing, not expected, or of a wrong shape or dtype: {', '.join(sorted(wrong))}"
        )


def _check_values(path: Path, file, weights: PrunedWeights) -> None:
    """Whether the tensors are the ones that were saved, and such that training can go on with them."""
    metadata, keys = file.metadata(), sorted(file.keys())
    found = checksum(metadata["hf_admm"], ((key, file.get_tensor(key)) for key in keys))
    if metadata.get("crc32") != found:
        raise _damaged(path, f"its checksum is {found}, and {metadata.get('crc32')} is recorded")
    diverged = []
    for key in keys:
        kind, name = key.split("/", 1)
        tensor = file.get_tensor(key)
        if kind == "mask":
            mask = unpack_mask(tensor, torch.Size(weights.targets[name].shape))
            if isinstance(weights.pattern, OwnPattern):
                if ((file.get_tensor(f"weight/{name}") != 0) & ~mask).any():
                    raise _damaged(path, f"weight/{name} has entries outside of its mask")
                continue
            groups = to_groups(mask, weights.pattern, weights.targets[name].transposed)
            # Early in phase 1 a mask may keep more than the pattern does, the same in each group.
            kept = groups.sum(dim=1)
            if (kept != kept[:1]).any() or (kept < kept_per_group(weights.pattern, groups.shape[1])).any():
                raise _damaged(path, f"{key} breaks pattern {weights.pattern}")
        elif tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
            diverged.append(key)
    if diverged:
        raise ValueError(
            f"{path} holds NaN or infinities in: {', '.join(diverged)}. The run had diverged when it was saved. "
            "Resume from an earlier checkpoint, with a lower learning_rate or admm_rho."
        )


def checksum(text: str, tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """
    CRC-32 of a text and of tensors with their names: a fraction of the time of writing them.

    Args:
        text (`str`):
            The text.
        tensors (`Iterable[tuple[str, torch.Tensor]]`):
            Names and tensors, in an order that is always the same.

    Returns:
        `str`: Eight hexadecimal digits.
    """
    value = zlib.crc32(text.encode())
    for key, tensor in tensors:
        value = zlib.crc32(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode(), value)
        value = zlib.crc32(tensor.detach().cpu().flatten().view(torch.uint8).numpy(), value)
    return f"{value:08x}"


@contextmanager
def _open(path: Path) -> Iterator:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, reason: object) -> ValueError:
    return ValueError(
        f"{path} can't be read as the sidecar of a sparse run ({reason}): it is damaged or from another program. "
        "Resume from another checkpoint."
    )

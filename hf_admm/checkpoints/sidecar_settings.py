"""What a sidecar says of itself, in either of its forms: the settings of the run, and which tensors go with them."""

import json
import math
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from hf_admm.pruning.state import ADMMState
from hf_admm.pruning.succession import PHASES
from hf_admm.sparsity.patterns import DensityPattern, SparsityPattern
from hf_admm.sparsity.projections import kept_per_group
from hf_admm.sparsity.targets import Target


SIDECAR_NAME = "admm_state.safetensors"
SHARDED_SIDECAR_NAME = "admm_state"
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
# As safetensors names them: weights are of any precision that is trained in.
_FLOATS = ("F64", "F32", "F16", "BF16")
_DTYPES = {"weight": _FLOATS, "other": _FLOATS, "anchor": ("F32", "BF16")}


def describe(state: ADMMState) -> str:
    """The settings of a run as JSON."""
    phase, weights = state.phase, state.weights
    settings = {
        "format_version": FORMAT_VERSION,
        "pattern": str(weights.pattern),
        "phase": phase.name,
        "rho": phase.rho,
        "updated_at": phase.updated_at,
        "figures": {name: float(figure) for name, figure in phase.figures.items()},
        "targets": {name: list(target.shape) for name, target in weights.targets.items()},
        "released": weights.released,
        "others": {name: list(parameter.shape) for name, (_, parameter) in state.other_weights().items()},
    }
    return json.dumps(settings)


def understand(text: object, path: Path) -> dict:
    """
    The inverse of [`describe`].

    Args:
        text (`object`):
            What lies where the JSON should be.
        path (`Path`):
            The sidecar, for messages.

    Returns:
        `dict`: The settings.

    Raises:
        `ValueError`: If it is no JSON of settings, or of another format.
    """
    try:
        settings = json.loads(text)
        version = settings["format_version"]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise damaged(path, error) from None
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {version!r}, this release reads {FORMAT_VERSION}. Resume with the release "
            "that wrote it."
        )
    if wrong := [name for name, valid in _SETTINGS.items() if not valid(settings.get(name))]:
        raise damaged(path, f"wrong or missing: {', '.join(wrong)}")
    if both := settings["targets"].keys() & settings["released"].keys():
        raise damaged(path, f"both pruned and left dense: {', '.join(sorted(both))}")
    return settings


def _is_shape(value) -> bool:
    return type(value) is list and all(type(side) is int for side in value)


def _is_matrix(value) -> bool:
    return _is_shape(value) and len(value) >= 2


def check_run(folder: str, settings: Mapping, pattern: SparsityPattern | None, targets: Mapping[str, Target]) -> None:
    """
    Checks that a run can go on from settings.

    Args:
        folder (`str`):
            The checkpoint's folder, for messages.
        settings (`Mapping`):
            Those of the checkpoint.
        pattern ([`SparsityPattern`], *optional*), targets (`Mapping[str, Target]`):
            Those of this run.

    Raises:
        `ValueError`: If the pattern, the targets or their shapes differ.
    """
    if pattern is None:
        raise ValueError(
            f"{folder} is a checkpoint of a sparse run (pattern {settings['pattern']}), this run has "
            "sparsity_pattern='none'. Resume with the checkpoint's pattern, or start a new run from its weights "
            "with from_pretrained."
        )
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


def check_tensors(path: Path, settings: Mapping, found: Mapping[str, tuple[str, list[int]]], masks: Mapping) -> None:
    """
    Checks that every target has its tensors, of the right shape and dtype, and nothing else is there.

    Args:
        path (`Path`):
            The sidecar, for messages.
        settings (`Mapping`):
            Its settings.
        found (`Mapping[str, tuple[str, list[int]]]`):
            Dtype, as safetensors names it, and shape of each of its tensors.
        masks (`Mapping[str, list]`):
            By target, what dtype and shape its mask may have.

    Raises:
        `ValueError`: If one is missing or wrong.
    """
    kinds = PHASES[settings["phase"]].kinds()
    expected = {f"{kind}/{name}": (kind, name, shape) for kind in kinds for name, shape in settings["targets"].items()}
    expected |= {f"other/{name}": ("other", name, shape) for name, shape in settings["others"].items()}
    wrong = set(found) ^ expected.keys()
    for key in found.keys() & expected.keys():
        kind, name, shape = expected[key]
        allowed = masks[name] if kind == "mask" else [(dtype, shape) for dtype in _DTYPES[kind]]
        if found[key] not in allowed:
            wrong.add(key)
    if wrong:
        raise damaged(path, f"tensors missing, not expected, or of a wrong shape or dtype: {', '.join(sorted(wrong))}")


def breaks_pattern(kept: tuple[int, int] | None, pattern: SparsityPattern, shape: torch.Size) -> bool:
    """Whether no run can have left a mask of a shape whose groups keep between the least and the most of `kept`."""
    if kept is None:
        return False
    group_size = math.prod(shape) if isinstance(pattern, DensityPattern) else pattern.group_size
    # Early in phase 1 a mask may keep more than the pattern does, the same in each group.
    return kept[0] != kept[1] or kept[0] < kept_per_group(pattern, group_size)


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinities."""
    return not tensor.numel() or bool(torch.stack(tensor.aminmax()).isfinite().all())


def damaged(path: Path, reason: object) -> ValueError:
    """The error for a sidecar that is not what was saved."""
    return ValueError(
        f"{path} can't be read as the sidecar of a sparse run ({reason}): it is damaged or from another program. "
        "Resume from another checkpoint."
    )


def diverged(path: Path, keys: Iterable[str]) -> ValueError:
    """The error for a sidecar with values that no training can go on with."""
    return ValueError(
        f"{path} holds NaN or infinities in: {', '.join(keys)}. The run had diverged when it was saved. "
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


def packed_bytes(shape: Iterable[int]) -> int:
    """How many bytes a mask of a shape takes, a bit an entry."""
    return -(-math.prod(shape) // 8)

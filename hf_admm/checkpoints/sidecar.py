"""The sidecar of a checkpoint: the dense working weights and the anchors or masks that an exact resume needs.

`model.safetensors` beside it holds the sparse weights, so any checkpoint loads anywhere; only a resume reads this
file. It is one safetensors file whose header carries the settings, written to a temporary name and renamed: it is
either whole or not there. A checksum over all of it tells a flipped bit, which would be trained on in silence.
"""

import json
import os
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hf_admm.pruning.shards import DTensor, gather, scatter
from hf_admm.pruning.state import ADMMState
from hf_admm.sparsity.masks import pack_mask, unpack_mask
from hf_admm.sparsity.patterns import SparsityPattern
from hf_admm.sparsity.projections import kept_per_group, to_groups
from hf_admm.sparsity.targets import Target


SIDECAR_NAME = "admm_state.safetensors"
FORMAT_VERSION = 2

# Each setting with what it may be. Figures are floats as JSON has them, NaN included.
_SETTINGS = {
    "pattern": lambda value: type(value) is str,
    "phase": lambda value: value in ("admm", "srste"),
    "rho": lambda value: type(value) in (int, float) and 0 <= value <= 1e30,
    "updated_at": lambda value: type(value) is int and value >= 0,
    "figures": lambda value: type(value) is dict and all(type(figure) is float for figure in value.values()),
    "targets": lambda value: type(value) is dict and all(map(_is_shape, value.values())),
}
# As safetensors names them: weights are of any precision that is trained in; masks are packed, a bit an entry.
_DTYPES = {"weight": ("F64", "F32", "F16", "BF16"), "anchor": ("F32", "BF16"), "mask": ("U8",)}


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
    tensors = {}
    held = {"weight": dict(state.dense_weights())}
    held |= {"anchor": state.anchors} if state.phase == "admm" else {"mask": state.masks}
    for kind, parts in held.items():
        for name, part in parts.items():
            weight = state.weights[name]
            if kind == "mask" and isinstance(weight, DTensor):  # packed by process, so the whole is packed anew
                whole = pack_mask(gather(state.mask(name), weight))
            else:
                whole = gather(part, weight)
            if write:  # gathered tensors are taken off the device one by one
                tensors[f"{kind}/{name}"] = (whole.cpu() if isinstance(weight, DTensor) else whole).contiguous()
    if not write:
        return
    settings = {
        "format_version": FORMAT_VERSION,
        "pattern": str(state.pattern),
        "phase": state.phase,
        "rho": state.rho,
        "updated_at": state.updated_at,
        "figures": {name: float(figure) for name, figure in state.figures.items()},
        "targets": {name: list(target.shape) for name, target in state.targets.items()},
    }
    path = Path(folder) / SIDECAR_NAME
    temporary = path.with_suffix(".tmp")
    text = json.dumps(settings)
    save_file(tensors, temporary, metadata={"hf_admm": text, "crc32": _checksum(text, sorted(tensors.items()))})
    os.replace(temporary, path)


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
    gone = ", ".join(sorted(set(settings["targets"]) - set(targets)))
    new = ", ".join(sorted(set(targets) - set(settings["targets"])))
    if gone or new:
        raise ValueError(
            f"{folder} was trained with other targets. In the checkpoint only: {gone or 'none'}. In this run only: "
            f"{new or 'none'}. Resume with the checkpoint's sparsity_include and sparsity_exclude."
        )
    reshaped = [name for name, target in targets.items() if list(target.shape) != settings["targets"][name]]
    if reshaped:
        raise ValueError(
            f"{folder} was trained with other shapes of: {', '.join(reshaped)}. Resume with the model that the "
            "checkpoint was trained from."
        )
    _check_tensors(path, settings)


@torch.no_grad()
def load_sidecar(state: ADMMState, folder: str | os.PathLike) -> None:
    """
    Restores a state and the dense weights of its model, in place.

    Args:
        state ([`ADMMState`]):
            A state that was `reset` on the live model.
        folder (`str` or `os.PathLike`):
            The checkpoint's folder.

    Raises:
        `ValueError`: If the sidecar does not fit, see [`check_sidecar`], or its values are damaged or not finite. The
            model and the state are then as they were.
    """
    check_sidecar(folder, state.pattern, state.targets)
    path = Path(folder) / SIDECAR_NAME
    settings = _settings(path)
    kind, companions = ("anchor", state.anchors) if settings["phase"] == "admm" else ("mask", state.masks)
    with _open(path) as file:
        _check_values(path, file, state)
        for name, part in state.local_weights():
            weight = state.weights[name]
            part.copy_(scatter(file.get_tensor(f"weight/{name}").to(part.device), weight))
            companion = file.get_tensor(f"{kind}/{name}").to(part.device)
            if kind == "mask":
                if isinstance(weight, DTensor):
                    companion = pack_mask(scatter(unpack_mask(companion, weight.shape), weight))
                # A copy: what safetensors gives on a CPU is the file itself, mapped, and would change with it.
                companions[name] = companion.clone()
                state.anchors[name] = state.room(part, part.dtype)
            else:
                companions[name] = state.room(part, state.anchor_dtype).copy_(scatter(companion, weight))
    state.phase, state.rho, state.updated_at = settings["phase"], settings["rho"], settings["updated_at"]
    state.figures = settings["figures"]
    state.resumed = True


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
    return settings


def _is_shape(value) -> bool:
    return type(value) is list and len(value) == 2 and all(type(side) is int for side in value)


def _check_tensors(path: Path, settings: dict) -> None:
    """Whether every target has its tensors, of the right shape and dtype, and nothing else is there."""
    kinds = ("weight", "anchor" if settings["phase"] == "admm" else "mask")
    expected = {f"{kind}/{name}": (kind, shape) for kind in kinds for name, shape in settings["targets"].items()}
    with _open(path) as file:
        keys = set(file.keys())
        wrong = keys ^ expected.keys()
        for key in keys & expected.keys():
            kind, shape = expected[key]
            if kind == "mask":
                shape = [-(-shape[0] * shape[1] // 8)]
            header = file.get_slice(key)
            if header.get_dtype() not in _DTYPES[kind] or list(header.get_shape()) != shape:
                wrong.add(key)
    if wrong:
        raise _damaged(
            path, f"tensors missing, not expected, or of a wrong shape or dtype: {', '.join(sorted(wrong))}"
        )


def _check_values(path: Path, file, state: ADMMState) -> None:
    """Whether the tensors are the ones that were saved, and such that training can go on with them."""
    metadata, keys = file.metadata(), sorted(file.keys())
    checksum = _checksum(metadata["hf_admm"], ((key, file.get_tensor(key)) for key in keys))
    if metadata.get("crc32") != checksum:
        raise _damaged(path, f"its checksum is {checksum}, and {metadata.get('crc32')} is recorded")
    diverged = []
    for key in keys:
        kind, name = key.split("/", 1)
        tensor = file.get_tensor(key)
        if kind == "mask":
            mask = unpack_mask(tensor, torch.Size(state.targets[name].shape))
            groups = to_groups(mask, state.pattern, state.targets[name].transposed)
            if (groups.sum(dim=1) != kept_per_group(state.pattern, groups.shape[1])).any():
                raise _damaged(path, f"{key} breaks pattern {state.pattern}")
        elif tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
            diverged.append(key)
    if diverged:
        raise ValueError(
            f"{path} holds NaN or infinities in: {', '.join(diverged)}. The run had diverged when it was saved. "
            "Resume from an earlier checkpoint, with a lower learning_rate or admm_rho."
        )


def _checksum(text: str, tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """CRC-32 of the settings and of all tensors with their names: a fraction of the time of writing them."""
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

"""The sidecar of a checkpoint: the dense working weights and the anchors or masks that an exact resume needs.

`model.safetensors` beside it holds the sparse weights, so any checkpoint loads anywhere; only a resume reads this
file. It is one safetensors file whose header carries the settings, written to a temporary name and renamed: it is
either whole or not there.
"""

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from hf_admm.patterns import SparsityPattern
from hf_admm.shards import gather, scatter
from hf_admm.state import ADMMState
from hf_admm.targets import Target


SIDECAR_NAME = "admm_state.safetensors"
FORMAT_VERSION = 1


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
    save_file(tensors, temporary, metadata={"hf_admm": json.dumps(settings)})
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
        `ValueError`: If the sidecar is missing or unreadable, or its pattern, targets or their shapes differ.
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
        `ValueError`: If the sidecar does not fit, see [`check_sidecar`].
    """
    check_sidecar(folder, state.pattern, state.targets)
    path = Path(folder) / SIDECAR_NAME
    settings = _settings(path)
    kind, companions = ("anchor", state.anchors) if settings["phase"] == "admm" else ("mask", state.masks)
    with safe_open(path, framework="pt") as file:
        for name, part in state.local_weights():
            weight = state.weights[name]
            part.copy_(scatter(file.get_tensor(f"weight/{name}").to(part.device), weight))
            companions[name] = scatter(file.get_tensor(f"{kind}/{name}").to(part.device), weight)
    if settings["phase"] == "srste":
        state.anchors = {name: torch.empty_like(part) for name, part in state.local_weights()}
    state.phase, state.rho, state.updated_at = settings["phase"], settings["rho"], settings["updated_at"]
    state.figures = settings["figures"]
    state.resumed = True


def _settings(path: Path) -> dict:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        settings = json.loads(metadata["hf_admm"])
    except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} can't be read as the sidecar of a sparse run ({error}): it is damaged or from another program. "
            "Resume from another checkpoint."
        ) from None
    if settings.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {settings.get('format_version')!r}, this release reads {FORMAT_VERSION}. "
            "Resume with the release that wrote it."
        )
    return settings

"""The sidecar of a checkpoint: the dense working weights and the anchors or masks that an exact resume needs.

`model.safetensors` beside it holds the sparse weights, so any checkpoint loads anywhere; only a resume reads this.
It has two forms, one file of whole tensors and a folder of shards, and either can be resumed as the other is.
"""

import os
from pathlib import Path

import torch

from hf_admm.checkpoints.sidecar_file import SidecarFile
from hf_admm.checkpoints.sidecar_folder import SidecarFolder
from hf_admm.checkpoints.sidecar_settings import SHARDED_SIDECAR_NAME, SIDECAR_NAME, check_run, checksum
from hf_admm.pruning.phases import PhaseSettings
from hf_admm.pruning.shards import local
from hf_admm.pruning.state import ADMMState
from hf_admm.pruning.succession import PHASES
from hf_admm.sparsity.patterns import OwnPattern, SparsityPattern
from hf_admm.sparsity.targets import Target, named_parameters


__all__ = [
    "SHARDED_SIDECAR_NAME",
    "SIDECAR_NAME",
    "check_sidecar",
    "checksum",
    "find_sidecar",
    "has_sidecar",
    "load_sidecar",
    "save_sidecar",
]


def save_sidecar(state: ADMMState, folder: str | os.PathLike, write: bool = True, sharded: bool = False) -> None:
    """
    Writes the sidecar of a checkpoint. Every process must call it.

    Args:
        state ([`ADMMState`]):
            The state.
        folder (`str` or `os.PathLike`):
            The checkpoint's folder.
        write (`bool`, *optional*, defaults to `True`):
            Whether this process writes the file, or only gives the others its shards.
        sharded (`bool`, *optional*, defaults to `False`):
            Whether it is a folder into which each process writes its own shards, whatever `write` says, instead of one
            file of whole tensors. All processes must see the folder.
    """
    (SidecarFolder if sharded else SidecarFile).save(state, Path(folder), write)


def find_sidecar(folder: str | os.PathLike) -> SidecarFile | SidecarFolder | None:
    """The sidecar of a checkpoint, `None` if there is none; the newer of two, if a killed run left the old one."""
    found = [sidecar for form in (SidecarFile, SidecarFolder) if (sidecar := form.find(Path(folder))) is not None]
    return max(found, key=lambda sidecar: sidecar.written_at, default=None)


def has_sidecar(folder: str | os.PathLike, pattern: SparsityPattern | None, targets: dict[str, Target]) -> bool:
    """
    Whether a resume has a sidecar to read: not where all that was sparse is frozen, as under adapters.

    Args:
        folder, pattern, targets:
            As for [`check_sidecar`].
    """
    return bool(targets) or not isinstance(pattern, OwnPattern) or find_sidecar(folder) is not None


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
    sidecar = find_sidecar(folder)
    if sidecar is None:
        if pattern is None:
            return
        raise ValueError(
            f"{folder} has no {SIDECAR_NAME} (nor {SHARDED_SIDECAR_NAME}), the dense weights and dual variables that "
            "an exact resume needs: it was saved with save_only_model=True, or by a dense run. Resume from a full "
            "checkpoint, or start a new run from its weights with from_pretrained."
        )
    settings = sidecar.settings()
    check_run(str(folder), settings, pattern, targets)
    sidecar.check_tensors(settings)


@torch.no_grad()
def load_sidecar(state: ADMMState, folder: str | os.PathLike, settings: PhaseSettings) -> None:
    """
    Restores a state and the dense weights of its model, in place. Every process must call it.

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
    sidecar = find_sidecar(folder)
    saved = sidecar.settings()
    with sidecar.opened(saved, weights) as parts:
        for name, reason in saved["released"].items():
            weights.released[name] = reason
            if name in weights.targets:
                weights.release(name, reason)
        phase = PHASES[saved["phase"]](weights, settings)
        for name, part in weights.local():
            part.copy_(parts.weight(f"weight/{name}", weights.parameters[name]))
            if phase.companion:
                phase.restore(name, parts.companion(phase, name))
        parameters = named_parameters(weights.model)
        for name in saved["others"]:
            local(parameters[name].detach()).copy_(parts.weight(f"other/{name}", parameters[name]))
    phase.restored()
    phase.rho, phase.updated_at, phase.figures = saved["rho"], saved["updated_at"], saved["figures"]
    state.phase, state.resumed = phase, True

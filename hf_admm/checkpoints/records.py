"""The records of a save: beside each file of weights that it wrote, which of its tensors are sparse."""

import json
import os
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_admm.checkpoints.distributed_files import FSDP_MODEL_NAME, has_sharded_model
from hf_admm.checkpoints.files import INDEX_NAME, RECORD_NAME, RECORD_VERSION, WEIGHTS_NAME
from hf_admm.checkpoints.saved_names import saved_names
from hf_admm.checkpoints.staging import STAGING_NAME
from hf_admm.console import get_logger
from hf_admm.pruning.weights import PrunedWeights
from hf_admm.sparsity.patterns import SparsityPattern
from hf_admm.version import __version__


ADAPTER_NAME = "adapter_model.safetensors"  # all that PEFT saves: its base lies elsewhere

logger = get_logger(__name__)


def find_weights(folder: Path) -> dict[Path, tuple]:
    """
    The files of weights in a folder and in the folders within it, but not in the checkpoints within it.

    Args:
        folder (`Path`):
            The folder; it need not exist.

    Returns:
        `dict[Path, tuple]`: For each `model.safetensors`, index of shards, or folder of the shards of FSDP, what tells
            whether it is written anew.
    """
    found = {}
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name != STAGING_NAME and not name.startswith(PREFIX_CHECKPOINT_DIR)]
        written = {Path(place) / name for name in {WEIGHTS_NAME, INDEX_NAME}.intersection(files)}
        if has_sharded_model(Path(place)):
            folders.remove(FSDP_MODEL_NAME)
            written.add(Path(place) / FSDP_MODEL_NAME)
        for path in written:
            status = path.stat()
            found[path] = (status.st_mtime_ns, status.st_ino, status.st_size)
    return found


@contextmanager
def without_records(folder: Path, writes: bool):
    """
    Around a save of a dense model: where it writes weights over those of a sparse one, it takes their record away.

    Args:
        folder (`Path`):
            Where it is saved.
        writes (`bool`):
            Whether this process does.
    """
    before = find_weights(folder) if writes else {}
    yield
    if writes:
        for path, status in find_weights(folder).items():
            if before.get(path) != status:
                (path.parent / RECORD_NAME).unlink(missing_ok=True)


def save_records(model: nn.Module, weights: PrunedWeights, before: Mapping[Path, Mapping[Path, tuple]]) -> None:
    """
    Writes what `hf-admm verify` checks against. Nothing needs it to load the model, so that what goes wrong is a
    warning.

    Args:
        model (`nn.Module`):
            The model that was saved, unwrapped.
        weights ([`PrunedWeights`]):
            Its sparse weights, as they were saved.
        before (`Mapping[Path, Mapping[Path, tuple]]`):
            For each folder that it was saved in, what [`find_weights`] found there before.
    """
    folders = " and ".join(folder.name for folder in before)
    try:
        old = {path: status for found in before.values() for path, status in found.items()}
        new = {path: status for folder in before for path, status in find_weights(folder).items()}
        places = {path.parent for path, status in new.items() if old.get(path) != status}
        found = 0
        for place in sorted(places):
            # The few that are saved fused with others are left to verify, which judges them by their zeros.
            keys = saved_names(model, weights.parameters, place)
            found += len(keys)
            if keys:
                _write(place, weights, keys)
            else:
                (place / RECORD_NAME).unlink(missing_ok=True)  # of another model that was saved here
        if not found and not any((folder / ADAPTER_NAME).is_file() for folder in before):
            why = "none of the sparse weights is found in what was saved" if places else f"no {WEIGHTS_NAME} was saved"
            logger.warning(
                f"{folders} has no sparsity record for hf-admm verify: {why}. Name what it should find sparse there "
                "with --expect, or save with trainer.save_model."
            )
    except Exception as error:
        logger.warning(
            f"The sparsity record of {folders} could not be written ({type(error).__name__}: {error}). The model "
            "there is as it was saved; hf-admm verify judges it by its zeros."
        )


def record_text(
    pattern: SparsityPattern | str, targets: Mapping[str, bool], kept: Mapping[str, int] | None = None
) -> str:
    """
    The JSON of a record.

    Args:
        pattern ([`SparsityPattern`] or `str`):
            The pattern.
        targets (`Mapping[str, bool]`):
            Keys of the sparse weights, and whether each is stored as `(in_features, out_features)`.
        kept (`Mapping[str, int]`, *optional*):
            By key, how many entries may be non-zero where the pattern does not tell.

    Returns:
        `str`
    """
    entries = {key: {"transposed": transposed} for key, transposed in targets.items()}
    for key, count in (kept or {}).items():
        entries[key]["kept"] = count
    record = {
        "format_version": RECORD_VERSION,
        "hf_admm_version": __version__,
        "pattern": str(pattern),
        "targets": entries,
    }
    return json.dumps(record, indent=2)


def _write(folder: Path, weights: PrunedWeights, keys: Mapping[str, str]) -> None:
    targets = {key: weights.targets[name].transposed for name, key in keys.items()}
    kept = {keys[name]: count for name, count in weights.kept.items() if name in keys}
    temporary = folder / f"{RECORD_NAME}.tmp"
    temporary.write_text(record_text(weights.pattern, targets, kept) + "\n")
    os.replace(temporary, folder / RECORD_NAME)

"""Models that are saved under other names than their parameters have.

transformers saves some architectures in the format of their first release: the layers of ViT renamed, the experts of
Mixtral as matrices of their own. `from_pretrained` knows the way back. `load_state_dict`, by which Trainer resumes and
loads the best model, does not: it finds keys missing, warns, and goes on with the weights that the model has
(https://github.com/huggingface/transformers/issues/48805).
"""

import os
from collections.abc import Mapping
from functools import reduce
from itertools import takewhile
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from hf_admm.checkpoints.files import read_names, read_some
from hf_admm.console import get_logger
from hf_admm.pruning.shards import DTensor


logger = get_logger(__name__)


def saved_names(model: nn.Module, weights: Mapping[str, torch.Tensor], folder: Path) -> dict[str, str]:
    """
    Under which keys weights are found in a checkpoint: their own names, those of the first release of an architecture,
    or where an inner model was saved alone, as Sentence Transformers and many wrappers do, the rest of their names.

    Args:
        model (`nn.Module`):
            The model that was saved.
        weights (`Mapping[str, torch.Tensor]`):
            Weights of the model as they were saved, by parameter name.
        folder (`Path`):
            The checkpoint's folder.

    Returns:
        `dict[str, str]`: Key by parameter name, without those that are saved in another shape than they have, such as
        fused with others.
    """
    saved = read_names(folder)
    names = {name: name for name in weights if name in saved}
    taken = set(names.values())
    parts = {prefix: module for prefix, module in model.named_modules() if isinstance(module, PreTrainedModel)}
    for name, weight in weights.items():
        if name not in names:
            key = _renamed(parts, name, weight)
            key = key if key in saved else _relocated(name, weight, saved - taken, folder)
            if key is not None:
                names[name] = key
                taken.add(key)
    return {name: names[name] for name in weights if name in names}


def _renamed(parts: Mapping[str, PreTrainedModel], name: str, weight: torch.Tensor) -> str | None:
    """The key under which the model of transformers that has a weight saves it, be it a part of another model."""
    if isinstance(weight, DTensor):  # one process alone writes the record, and can't compare shards
        return None
    for prefix, part in parts.items():
        if prefix and not name.startswith(f"{prefix}."):
            continue
        try:
            converted = revert_weight_conversion(part, {name[len(prefix) :].lstrip("."): weight.detach()})
        except Exception:  # whatever its operations raise where they miss the weights that it is fused with
            return None
        # The same tensor, neither split nor transposed: the groups are where they were.
        return next((key for key, tensor in converted.items() if torch.equal(tensor, weight)), None)
    return None


def _relocated(name: str, weight: torch.Tensor, keys: set[str], folder: Path) -> str | None:
    """The key of a weight of an inner model that was saved alone, or in a wrapper: its last parts, and its values."""
    shared = {key: _shared_parts(name, key) for key in keys}
    candidates = sorted((key for key in keys if shared[key] > 1), key=lambda key: (-shared[key], len(key), key))
    sharded = isinstance(weight, DTensor)
    for key, tensor in read_some(folder, candidates):
        if tensor.shape == weight.shape and (sharded or torch.equal(tensor, weight.detach().to("cpu", tensor.dtype))):
            return key
    return None


def _shared_parts(name: str, key: str) -> int:
    """How many of the last parts of two dotted names are the same."""
    pairs = zip(reversed(name.split(".")), reversed(key.split(".")), strict=False)
    return len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))


@torch.no_grad()
def load_renamed(model: nn.Module, folder: str | os.PathLike) -> bool:
    """
    Loads a checkpoint into a model if it holds other names than the model, in place.

    Args:
        model (`nn.Module`):
            The live model, unwrapped.
        folder (`str` or `os.PathLike`):
            The checkpoint's folder.

    Returns:
        `bool`: Whether it was loaded; `False` if its names are the model's, or if `from_pretrained` would not help.
    """
    try:
        unknown = read_names(Path(folder)) - set(model.state_dict())
    except ValueError:  # no safetensors: Trainer knows what to do or to say
        return False
    if not unknown or not isinstance(model, PreTrainedModel):
        return False
    # In a dtype that holds all of the model's, so that no number is rounded on its way.
    dtype = reduce(torch.promote_types, {parameter.dtype for parameter in model.parameters()})
    copy, info = type(model).from_pretrained(folder, config=model.config, dtype=dtype, output_loading_info=True)
    if info["missing_keys"]:
        return False
    model.load_state_dict(copy.state_dict())
    logger.info(f"{folder} holds other names than {type(model).__name__} has: loaded with from_pretrained.")
    return True

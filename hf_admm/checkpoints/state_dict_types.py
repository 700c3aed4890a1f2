"""The two ways of FSDP2 to save: whole (`FULL_STATE_DICT`), or in shards (`SHARDED_STATE_DICT`).

accelerate looks the way up anew whenever it saves or loads something, so that it can be changed in between. In shards,
Trainer's `save_model` writes nothing; a checkpoint has its weights in a folder of shards then, beside the optimizer's.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator

from hf_admm.checkpoints.distributed_files import has_sharded_model


FULL, SHARDED = "FULL_STATE_DICT", "SHARDED_STATE_DICT"
_OF_A_TYPE = ("state_dict_type", "state_dict_config", "optim_state_dict_config")
_WHOLE_MODEL_NAME = "pytorch_model_fsdp.bin"  # as accelerate has it


def state_dict_type(accelerator: Accelerator) -> str | None:
    """The way in use, `None` without FSDP."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    return None if plugin is None else getattr(plugin.state_dict_type, "name", str(plugin.state_dict_type))


def saves_shards(accelerator: Accelerator) -> bool:
    """Whether what FSDP2 has divided is saved in shards."""
    return state_dict_type(accelerator) == SHARDED


@contextmanager
def whole(accelerator: Accelerator) -> Iterator[None]:
    """Within it, what FSDP2 has divided is saved and loaded whole."""
    with _as(accelerator, FULL):
        yield


@contextmanager
def as_saved(accelerator: Accelerator, checkpoint: str | os.PathLike) -> Iterator[None]:
    """Within it, FSDP2 loads in the way that a checkpoint was saved in, whatever it saves in."""
    folder, wanted = Path(checkpoint), None
    if has_sharded_model(folder):
        wanted = SHARDED
    elif (folder / _WHOLE_MODEL_NAME).is_file():
        wanted = FULL
    with _as(accelerator, wanted):
        yield


@contextmanager
def _as(accelerator: Accelerator, wanted: str | None) -> Iterator[None]:
    now = state_dict_type(accelerator)
    if now is None or wanted in (None, now):
        yield
        return
    plugin = accelerator.state.fsdp_plugin
    before = {name: getattr(plugin, name) for name in _OF_A_TYPE}
    plugin.state_dict_config = plugin.optim_state_dict_config = None  # what is there stays, and is of the other type
    try:
        plugin.set_state_dict_type(wanted)
        yield
    finally:
        for name, value in before.items():
            setattr(plugin, name, value)

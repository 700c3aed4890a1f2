"""Passes of a model outside of the training steps, that leave no trace in what follows."""

import copy
import random
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from hf_admm.pruning.shards import local, reshard


@contextmanager
def same_randomness(model: nn.Module, device: torch.device):
    """What is drawn within is drawn again after it."""
    devices = {parameter.device for parameter in model.parameters()} | {device}
    devices = sorted((d for d in devices if d.type not in ("cpu", "mps", "meta")), key=str)
    python, arrays = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices, device_type=devices[0].type if devices else "cuda"):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)


@contextmanager
def as_it_was(model: nn.Module, trainer: object):
    """
    Takes back what forward passes do to a model, and to the trainer that prepares its inputs: statistics in buffers
    and in parameters that are not trained, counters, lists, modes, hooks of a forward (transformers leaves those that
    collect hidden states, and a mark that they are there).
    """
    owners = [trainer, *model.modules()]
    modules = [(module, dict(module._buffers)) for module in model.modules()]
    attributes = [(owner, _attributes(owner)) for owner in owners]
    tables = [vars(module).get(name) for module in model.modules() for name in _HOOKS]  # scripted modules have none
    hooks = [(table, set(table)) for table in tables if table is not None]
    contents = [
        (inner, _copied(inner)) for _, held in attributes for value in held.values() for inner in _within(value)
    ]
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    values = [(tensor, tensor.clone()) for tensor in map(local, [*model.buffers(), *(p.detach() for p in frozen)])]
    try:
        yield
    finally:
        for module, buffers in modules:
            module._buffers.update(buffers)
        for owner, held in attributes:
            for name in _attributes(owner).keys() - held.keys():
                del vars(owner)[name]
            vars(owner).update(held)
        for table, held in hooks:
            for key in table.keys() - held:
                del table[key]
        for value, content in contents:
            _restore(value, content)
        with torch.no_grad():
            for tensor, value in values:
                if not torch.equal(tensor, value):  # those that are views of one entry can't be written
                    tensor.copy_(value)
        reshard(model)


_OF_EVERY_MODULE = vars(nn.Module()).keys() - {"training"}
_HOOKS = [name for name in _OF_EVERY_MODULE if name.startswith("_forward_")]  # FSDP2 sets up others in its first pass


def _attributes(owner: object) -> dict[str, object]:
    """What an object holds of its own, beside the tables of every module."""
    tables = _OF_EVERY_MODULE if isinstance(owner, nn.Module) else ()
    return {name: value for name, value in vars(owner).items() if name not in tables}


def _within(value: object) -> Iterator:
    """What may be changed in place and can be taken back: a value, and what the dicts in it hold."""
    if type(value) in (list, dict, defaultdict, set, deque):
        yield value
        if isinstance(value, dict):  # of metrics, say, which some trainers keep by kind of batch and by name
            for inner in list(value.values()):
                if not isinstance(inner, torch.Tensor):
                    yield from _within(inner)
    elif isinstance(value, torch.Tensor) and not value.requires_grad:
        yield value


def _copied(value):
    return value.clone() if isinstance(value, torch.Tensor) else copy.copy(value)


def _restore(value, content) -> None:
    if isinstance(value, torch.Tensor):
        if not torch.equal(value, content):
            value.copy_(content)
        return
    value.clear()
    value.extend(content) if isinstance(value, list | deque) else value.update(content)

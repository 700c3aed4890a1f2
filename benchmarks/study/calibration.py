"""
Pruning before training, layer by layer, with what a few rows of the task show of each layer's inputs. How a weight is
pruned is said by `sparsegpt` and `layerwise`.
"""

import re
from collections.abc import Callable, Iterable
from itertools import groupby

import torch
from torch import nn

from hf_admm import parse_pattern
from hf_admm.sparsity.patterns import NMPattern


class Hessian:
    """
    `2 / n * sum of x x'` over the inputs x of a linear layer.

    Args:
        columns (`int`):
            Inputs of the layer.
    """

    def __init__(self, columns: int, device: torch.device | str = "cpu"):
        self.matrix, self.rows = torch.zeros(columns, columns, device=device), 0

    def add(self, inputs: torch.Tensor) -> None:
        """Takes in a matrix with an input in each row."""
        inputs = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        total = self.rows + len(inputs)
        self.matrix.mul_(self.rows / total).addmm_(inputs.T, inputs, alpha=2 / total)
        self.rows = total

    def take(self, layer: nn.Module, inputs: tuple) -> None:
        """As a hook before the layer's forward."""
        self.add(inputs[0])


@torch.no_grad()
def prune_model(model: nn.Module, names: Iterable[str], pattern: str, run: Callable, prune: Callable) -> None:
    """
    Prunes linear layers of a model in place, block by block, each with the inputs that it has once those before it are
    pruned.

    Args:
        model (`nn.Module`):
            The model.
        names (`Iterable[str]`):
            The weights to prune, in the order of the model.
        pattern (`str`):
            N:M.
        run (`Callable`):
            Sends the calibration rows through the model that it is given. Called once for each block, in evaluation
            mode.
        prune (`Callable`):
            Gives the pruned weight from a weight, its [`Hessian`]'s matrix, N and M.

    Raises:
        `ValueError`: If the pattern is not N:M, or a weight is not that of an `nn.Linear`.
    """
    parsed = parse_pattern(pattern)
    if not isinstance(parsed, NMPattern):
        raise ValueError(f"Layers are pruned one by one to N:M, not to {pattern!r}.")
    layers = {name: model.get_submodule(name.removesuffix(".weight")) for name in names}
    if others := [name for name, layer in layers.items() if not isinstance(layer, nn.Linear)]:
        raise ValueError(f"Layers are pruned one by one if they are nn.Linear, not {', '.join(others)}.")
    training = model.training
    model.eval()
    for _, block in groupby(layers.items(), key=lambda item: _block(item[0])):
        block = dict(block)
        found = {name: Hessian(layer.in_features, layer.weight.device) for name, layer in block.items()}
        hooks = [layer.register_forward_pre_hook(found[name].take) for name, layer in block.items()]
        try:
            run(model)
        finally:
            for hook in hooks:
                hook.remove()
        for name, layer in block.items():
            layer.weight.copy_(prune(layer.weight, found[name].matrix, parsed.kept, parsed.group_size))
    model.train(training)


def _block(name: str) -> str:
    """The layer of the model that a weight is in: its name up to the first number."""
    return (re.match(r".*?\d+", name) or [name])[0]

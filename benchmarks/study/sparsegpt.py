"""
SparseGPT for N:M, a rival that prunes before training: github.com/IST-DASLab/sparsegpt (Apache-2.0), `fasterprune`,
its operations in their order, written for this file; the N:M choice generalised to any N and M.

Blocks are pruned one after another, each with the inputs that it has once those before it are pruned.
"""

import re
from collections.abc import Callable, Iterable
from itertools import groupby

import torch
from torch import nn

from hf_admm import parse_pattern
from hf_admm.sparsity.patterns import NMPattern


DAMP = 0.01
_BLOCK = 128  # columns; a multiple of M is taken


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


def prune(weight: torch.Tensor, hessian: torch.Tensor, kept: int, group: int, damp: float = DAMP) -> torch.Tensor:
    """
    Prunes a weight to N:M and moves what is left so that the layer's output changes least.

    Args:
        weight (`torch.Tensor` of shape `(out_features, in_features)`):
            The weight; left as it is.
        hessian (`torch.Tensor` of shape `(in_features, in_features)`):
            See [`Hessian`].
        kept (`int`), group (`int`):
            N and M.
        damp (`float`, *optional*, defaults to 0.01):
            Added to the diagonal, as a share of its mean.

    Returns:
        `torch.Tensor`: The pruned weight, in float32.

    Raises:
        `ValueError`: If the number of inputs is not a multiple of M.
    """
    rows, columns = weight.shape
    if columns % group:
        raise ValueError(f"A weight of {columns} inputs has no groups of {group}.")
    weight, hessian = weight.detach().float().clone(), hessian.float().clone()
    diagonal = torch.arange(columns, device=weight.device)
    dead = hessian[diagonal, diagonal] == 0
    hessian[dead, dead] = 1
    weight[:, dead] = 0
    hessian[diagonal, diagonal] += damp * hessian.diagonal().mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    upper = torch.linalg.cholesky(inverse, upper=True)
    step = max(group, _BLOCK // group * group)
    for start in range(0, columns, step):
        end = min(start + step, columns)
        block, factor = weight[:, start:end].clone(), upper[start:end, start:end]
        pruned = torch.zeros(block.shape, dtype=torch.bool, device=weight.device)
        done, errors = torch.zeros_like(block), torch.zeros_like(block)
        for column in range(end - start):
            if column % group == 0:
                scores = block[:, column : column + group] / factor.diagonal()[column : column + group]
                least = scores.square().topk(group - kept, dim=1, largest=False).indices
                pruned.scatter_(1, column + least, True)
            done[:, column] = block[:, column].masked_fill(pruned[:, column], 0)
            errors[:, column] = (block[:, column] - done[:, column]) / factor[column, column]
            block[:, column:] -= errors[:, column : column + 1] * factor[column : column + 1, column:]
        weight[:, start:end] = done
        weight[:, end:] -= errors @ upper[start:end, end:]
    return weight


@torch.no_grad()
def prune_model(model: nn.Module, names: Iterable[str], pattern: str, run: Callable[[nn.Module], None]) -> None:
    """
    Prunes linear layers of a model in place, block by block.

    Args:
        model (`nn.Module`):
            The model.
        names (`Iterable[str]`):
            The weights to prune, in the order of the model.
        pattern (`str`):
            N:M.
        run (`Callable`):
            Sends the calibration rows through the model. Called once for each block, in evaluation mode.

    Raises:
        `ValueError`: If the pattern is not N:M, or a weight is not that of an `nn.Linear`.
    """
    parsed = parse_pattern(pattern)
    if not isinstance(parsed, NMPattern):
        raise ValueError(f"SparseGPT's choice of entries is for N:M, not for {pattern!r}.")
    layers = {name: model.get_submodule(name.removesuffix(".weight")) for name in names}
    if others := [name for name, layer in layers.items() if not isinstance(layer, nn.Linear)]:
        raise ValueError(f"SparseGPT prunes nn.Linear alone, not {', '.join(others)}.")
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

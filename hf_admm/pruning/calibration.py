"""Prunes layer by layer, with what a few rows of data put into each (docs/one_shot.md)."""

import inspect
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import cache
from itertools import groupby
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_admm.pruning.layerwise import output_error
from hf_admm.pruning.shards import local
from hf_admm.pruning.weights import PrunedWeights


_NEARLY_ALL = 2 / 3


def evenly(count: int, total: int) -> list[int]:
    """
    Places that lie evenly over a whole.

    Args:
        count (`int`):
            How many are wanted.
        total (`int`):
            How many there are.

    Returns:
        `list[int]`: At most `count` numbers below `total`, in order.
    """
    count = min(count, total)
    return [place * total // count for place in range(count)]


def layer_inputs(inputs: torch.Tensor, tokens: torch.Tensor | None = None) -> torch.Tensor:
    """
    What goes into a linear layer, one input a row.

    Args:
        inputs (`torch.Tensor` of shape `(..., in_features)`):
            The inputs.
        tokens (`torch.Tensor` of shape `(batch, sequence)`, *optional*):
            Zero where there is padding, which is left out. Without effect on inputs of another shape.

    Returns:
        `torch.Tensor` of shape `(n, in_features)`.
    """
    inputs = inputs.detach()
    if tokens is not None and inputs.shape[:-1] == tokens.shape:
        inputs = inputs[tokens.to(inputs.device).bool()]
    return inputs.reshape(-1, inputs.shape[-1])


class InputMoments:
    """
    The mean of `x x^T` over the inputs x of a linear layer, in float32.

    Args:
        features (`int`):
            Inputs of the layer.
        device (`torch.device` or `str`, *optional*, defaults to `"cpu"`):
            Where it is kept.
    """

    def __init__(self, features: int, device: torch.device | str = "cpu"):
        self.matrix, self.rows = torch.zeros(features, features, device=device), 0

    def add(self, inputs: torch.Tensor, tokens: torch.Tensor | None = None) -> None:
        """
        Takes in the inputs of a pass.

        Args:
            inputs (`torch.Tensor` of shape `(..., in_features)`), tokens (`torch.Tensor`, *optional*):
                As for [`layer_inputs`].
        """
        inputs = layer_inputs(inputs, tokens).float()
        if not len(inputs):
            return
        total = self.rows + len(inputs)
        self.matrix.mul_(self.rows / total).addmm_(inputs.T, inputs, alpha=1 / total)
        self.rows = total


@torch.no_grad()
def prune_in_blocks(
    weights: PrunedWeights,
    batches: Iterable,
    prune: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    forward: Callable[[Any], None] | None = None,
    leaves_unreached: bool = False,
    enough: int | None = None,
) -> dict[str, float]:
    """
    Prunes weights in place, in evaluation mode. Blocks follow one another, each with the inputs that it has once those
    before it are pruned. Where weights are sharded, every process must call it, with the same batches.

    Args:
        weights ([`PrunedWeights`]):
            The weights, in the order of the model. They are as before if anything fails; until the end, a copy of them
            is held.
        batches (`Iterable`):
            The data.
        prune (`Callable`):
            Gives the pruned weight from one of shape `(out_features, in_features)` and the second moments of its
            inputs.
        forward (`Callable`, *optional*):
            Calls the model with a batch, by default `model(**batch)` on the device of the model.
        leaves_unreached (`bool`, *optional*, defaults to `False`):
            Whether a weight that is no linear layer's that the batches reach is left as it is.
        enough (`int`, *optional*):
            How many tokens per input suffice a layer. As many of the batches are taken, lying evenly, as give every
            layer that they reach about so many. By default, all are.

    Returns:
        `dict[str, float]`: For each weight that was pruned, how much of its layer's output was changed.

    Raises:
        `ValueError`: If there is no batch or nothing but padding in them, if a weight is not reached or its inputs
            can't be told, or if it or its inputs are not finite.
    """
    batches, model = list(batches), weights.model
    if not batches:
        raise ValueError("There is no batch to see the inputs of the layers with: give a few hundred rows.")
    runs = _Runs(weights, batches, forward or (lambda batch: model(**_on_device_of(model, batch))))
    modes = {module: module.training for module in model.modules()}
    before, errors = {}, {}
    model.eval()
    try:
        reached = runs.tokens_of(weights.targets)
        if (missed := [name for name in weights.targets if name not in reached]) and not leaves_unreached:
            raise ValueError(
                f"The batches do not reach the forward of these layers: {', '.join(missed)}. Parts of "
                "nn.MultiheadAttention and unused experts are such. Name them in sparsity_exclude, or give more rows."
            )
        if reached and not any(reached.values()) and not leaves_unreached:
            raise ValueError("Nothing but padding reaches the layers: see the attention_mask of the batches.")
        if enough:
            runs.thin_out(max((enough * runs.features(name) / max(1, reached[name]) for name in reached), default=1))
        blocks = find_blocks(model, [name for name in weights.targets if name in reached])
        for _, block in groupby(blocks, blocks.get):
            for name, moments in runs.moments(list(block)).items():
                if not moments.rows and leaves_unreached:  # an expert, once the layers before it are pruned
                    continue
                whole, transposed = weights.whole_of(name), weights.targets[name].transposed
                if not (moments.matrix.isfinite().all() and whole.isfinite().all()):
                    damaged = "The inputs of" if whole.isfinite().all() else "The entries of"
                    raise ValueError(f"{damaged} {name} are not finite: the batches or the model are damaged.")
                before[name] = local(weights.parameters[name].detach()).clone()
                dense = whole.T if transposed else whole
                pruned = prune(dense, moments.matrix).to(whole.dtype) + 0.0  # no zero has a sign
                errors[name] = output_error(dense, pruned, moments.matrix)
                weights.replace(name, pruned.T if transposed else pruned)
    except BaseException:
        weights.reshard()
        for name, part in before.items():
            local(weights.parameters[name].detach()).copy_(part)
        raise
    finally:
        weights.reshard()
        for module, mode in modes.items():
            module.training = mode
    return errors


def find_blocks(model: nn.Module, names: list[str]) -> dict[str, str]:
    """
    The blocks of a model: items of its lists of modules of one class (T5 has a list of unlike parts in each block).

    Args:
        model (`nn.Module`):
            The model.
        names (`list[str]`):
            Its weights.

    Returns:
        `dict[str, str]`: For each weight the name of its block, or its own. Of items within items it is the outermost,
        or where one list holds nearly all of that, as a stage's list of blocks does, the item of this list. Experts
        are parts of their block. Where no list is of one class, it is the innermost item.
    """

    @cache
    def holds(prefix: str) -> int:
        return sum(name.startswith(f"{prefix}.") for name in names)

    found = {}
    for name in names:
        around, alike, last = name.split(".")[:-2], [], name
        for depth, part in enumerate(around):
            if "expert" in part:
                break
            if part.isdigit():
                last, items = ".".join(around[: depth + 1]), ".".join(around[:depth])
                if len({type(item) for item in model.get_submodule(items).children()}) == 1:
                    alike.append((items, last))
        block = alike[0][1] if alike else last
        for items, item in alike[1:]:
            if holds(items) > _NEARLY_ALL * holds(block):
                block = item
        found[name] = block
    return found


def _on_device_of(model: nn.Module, batch: Mapping) -> dict:
    if not isinstance(batch, Mapping):
        raise ValueError(
            f"A batch is a {type(batch).__name__}: give each as a dict of the model's arguments, as the collators of "
            "transformers do."
        )
    device = local(next(model.parameters())).device
    return {key: value.to(device) if torch.is_tensor(value) else value for key, value in batch.items()}


class _Runs:
    """Passes of batches through a model, in which the inputs of some layers are seen."""

    def __init__(self, weights: PrunedWeights, batches: list, forward: Callable[[Any], None]):
        self.weights, self.batches, self.forward = weights, batches, forward
        self.tokens: torch.Tensor | None = None  # zero where there is padding
        config = getattr(weights.model, "config", None)
        self.padded = not getattr(config, "is_encoder_decoder", False)  # whose decoder has other positions

    def features(self, name: str) -> int:
        """The inputs of a weight's layer."""
        target = self.weights.targets[name]
        return target.shape[0 if target.transposed else 1]

    def tokens_of(self, names: Iterable[str]) -> Counter[str]:
        """How many inputs the layer of each of these weights has, padding left out, if it is reached at all."""
        found = Counter()
        self.watch(names, lambda name, inputs, tokens: found.update({name: len(layer_inputs(inputs, tokens))}))
        return found

    def thin_out(self, share: float) -> None:
        """Takes that share of the batches from now on, if it is below 1."""
        total = len(self.batches)
        self.batches = [self.batches[place] for place in evenly(math.ceil(share * total), total)]

    def moments(self, names: list[str]) -> dict[str, InputMoments]:
        """The second moments of the inputs of each of these weights' layers."""
        found = {}
        for name in names:
            found[name] = InputMoments(self.features(name), local(self.weights.parameters[name]).device)
        self.watch(names, lambda name, inputs, tokens: found[name].add(inputs, tokens))
        return found

    def watch(self, names: Iterable[str], take: Callable) -> None:
        """Calls `take` with each of these weights' names, the inputs of its layer, and the mask of the padding."""
        model = self.weights.model
        with ExitStack() as hooks:
            for name in names:
                if name.endswith(".weight"):
                    layer = model.get_submodule(name.removesuffix(".weight"))
                    hook = layer.register_forward_pre_hook(
                        lambda layer, args, kwargs, name=name: take(
                            name, self._input(name, layer, args, kwargs), self.tokens
                        ),
                        with_kwargs=True,
                    )
                    hooks.enter_context(hook)
            for module in model.modules():
                if module is model or isinstance(module, PreTrainedModel):
                    hooks.enter_context(module.register_forward_pre_hook(self._see_padding, with_kwargs=True))
            for batch in self.batches:
                self.tokens = None
                self.weights.reshard()  # what was changed since the last pass
                self.forward(batch)

    def _input(self, name: str, layer: nn.Module, args: tuple, kwargs: dict) -> torch.Tensor:
        """Of what a layer was called with, the argument that its forward names first, else the first that fits."""
        first = next(iter(inspect.signature(layer.forward).parameters), None)
        given = [*args, *([kwargs[first]] if first in kwargs else []), *kwargs.values()]
        for value in given:
            if torch.is_tensor(value) and value.dim() and value.shape[-1] == self.features(name):
                return value
        raise ValueError(
            f"The layer of {name} was called with nothing that has its {self.features(name)} inputs "
            f"({', '.join(type(value).__name__ for value in given)}). Name it in sparsity_exclude."
        )

    def _see_padding(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        mask = kwargs.get("attention_mask")
        if self.padded and torch.is_tensor(mask) and mask.dim() == 2:
            self.tokens = mask

"""Prunes a model before training, layer by layer, so that each layer's output changes least (docs/one_shot.md)."""

import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import torch
from torch import nn

from hf_admm.pruning.layerwise import output_error, prune_layer
from hf_admm.pruning.shards import DTensor
from hf_admm.sparsity.patterns import OwnPattern, SparsityPattern, parse_pattern
from hf_admm.sparsity.targets import select_targets
from hf_admm.sparsity.verdicts import Target


@dataclass(frozen=True)
class OneShotReport:
    """
    What [`prune_one_shot`] did.

    Args:
        pattern ([`SparsityPattern`]):
            What the weights obey now.
        errors (`dict[str, float]`):
            For each weight that was pruned, by parameter name in the order of the model, how much of the layer's
            output over the calibration rows was changed: `||(W - W') X|| / ||W X||`.
    """

    pattern: SparsityPattern
    errors: dict[str, float]

    def table(self) -> str:
        """A plain-text table: weight, change of its output, and a summary line."""
        width = max(map(len, self.errors))
        lines = [f"{'weight':<{width}}  output changed"]
        lines += [f"{name:<{width}}  {error:>14.1%}" for name, error in self.errors.items()]
        return "\n".join([*lines, f"{len(self.errors)} weights pruned to {self.pattern}."])


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
        Takes in a tensor whose last dimension is that of the inputs.

        Args:
            inputs (`torch.Tensor` of shape `(..., in_features)`):
                The inputs.
            tokens (`torch.Tensor` of shape `(batch, sequence)`, *optional*):
                Zero where there is padding, which does not count. Without effect on inputs of another shape.
        """
        inputs = inputs.detach()
        if tokens is not None and inputs.shape[:-1] == tokens.shape:
            inputs = inputs[tokens.to(inputs.device).bool()]
        inputs = inputs.reshape(-1, inputs.shape[-1]).float()
        if not len(inputs):
            return
        total = self.rows + len(inputs)
        self.matrix.mul_(self.rows / total).addmm_(inputs.T, inputs, alpha=1 / total)
        self.rows = total


def prune_one_shot(
    model: nn.Module,
    batches: Iterable[Mapping],
    sparsity_pattern: str = "2:4",
    sparsity_include: list[str] | str | None = None,
    sparsity_exclude: list[str] | str | None = None,
) -> OneShotReport:
    """
    Prunes a model in place, without training, so that the output of each layer changes least over a few rows of data:
    ADMM chooses the mask of a layer, and what is kept is solved for. Blocks follow one another, each with the inputs
    that it has once those before it are pruned. To be fine-tuned afterwards, see the example.

    Args:
        model (`nn.Module`):
            The model. It is as before if anything fails; until the end, a copy of the weights to prune is held.
        batches (`Iterable[Mapping]`):
            What the model is called with, `model(**batch)`: a few hundred rows of the training data, such as the first
            batches of a data loader. Positions where `attention_mask` is 0 do not count, except in encoder-decoder
            models, whose decoder has other positions.
        sparsity_pattern (`str`, *optional*, defaults to `"2:4"`):
            `"N:M"`, `"RxC:K"` or a density.
        sparsity_include (`list[str]` or `str`, *optional*):
            As in [`ADMMTrainingArguments`].
        sparsity_exclude (`list[str]` or `str`, *optional*):
            As there.

    Returns:
        [`OneShotReport`]: How much of each layer's output was changed.

    Raises:
        `ValueError`: If the pattern is `"own"` or none, if there is no batch, if a weight to prune is sharded, is no
            linear layer's that the batches reach by its `forward` (all such are named), or if inputs are not finite.

    Example:

    ```python
    from torch.utils.data import DataLoader
    from transformers import DataCollatorWithPadding

    from hf_admm import ADMMTrainer, ADMMTrainingArguments, prune_one_shot

    batches = list(DataLoader(train, batch_size=8, collate_fn=DataCollatorWithPadding(tokenizer)))[:32]
    print(prune_one_shot(model, batches, "1:4").table())
    args = ADMMTrainingArguments(
        "out", sparsity_pattern="1:4", admm_steps=0, srste_mask="fixed", srste_lr_multiplier=1.0, learning_rate=2e-4
    )
    ADMMTrainer(model, args, train_dataset=train).train()
    ```
    """
    pattern = parse_pattern(sparsity_pattern)
    if isinstance(pattern, OwnPattern):
        raise ValueError('sparsity_pattern="own" keeps zeros and makes none. Give N:M, RxC:K or a density.')
    targets = select_targets(model, pattern, sparsity_include, sparsity_exclude).targets
    errors = prune_in_blocks(model, targets, batches, partial(prune_layer, pattern=pattern))
    return OneShotReport(pattern, errors)


@torch.no_grad()
def prune_in_blocks(
    model: nn.Module,
    targets: Mapping[str, Target],
    batches: Iterable[Mapping],
    prune: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> dict[str, float]:
    """
    What [`prune_one_shot`] does, for any way to prune a layer.

    Args:
        model (`nn.Module`), batches (`Iterable[Mapping]`):
            As there.
        targets (`Mapping[str, Target]`):
            The weights, in the order of the model.
        prune (`Callable`):
            Gives the pruned weight from one of shape `(out_features, in_features)` and the second moments of its
            inputs.

    Returns:
        `dict[str, float]`: How much of each layer's output was changed.

    Raises:
        `ValueError`: As there.
    """
    batches = list(batches)
    if not batches:
        raise ValueError("There is no batch to see the inputs of the layers with: give a few hundred rows.")
    if sharded := [name for name in targets if isinstance(model.get_parameter(name), DTensor)]:
        raise ValueError(f"Sharded weights can't be pruned in one shot: {', '.join(sharded)}. Prune before sharding.")
    modes = {module: module.training for module in model.modules()}
    before, errors = {}, {}
    model.eval()
    try:
        reached = set()
        _run(model, targets, batches, lambda name, inputs, tokens: reached.add(name))
        if missed := [name for name in targets if name not in reached]:
            raise ValueError(
                f"The batches do not reach the forward of these layers: {', '.join(missed)}. Parts of "
                "nn.MultiheadAttention and unused experts are such. Name them in sparsity_exclude, or give more rows."
            )
        for _, block in groupby(targets, key=_block):
            for name, moments in _moments(model, {name: targets[name] for name in block}, batches).items():
                if not moments.matrix.isfinite().all():
                    raise ValueError(f"The inputs of {name} are not finite: the batches or the model are damaged.")
                weight = model.get_parameter(name)
                before[name] = weight.detach().clone()
                dense = weight.T if targets[name].transposed else weight
                pruned = prune(dense, moments.matrix)
                errors[name] = output_error(dense, pruned, moments.matrix)
                weight.copy_(pruned.T if targets[name].transposed else pruned)
    except BaseException:
        for name, weight in before.items():
            model.get_parameter(name).copy_(weight)
        raise
    finally:
        for module, mode in modes.items():
            module.training = mode
    return errors


def _block(name: str) -> str:
    """The layer of the model that a weight is in: its name up to the first number."""
    return (re.match(r".*?\d+", name) or [name])[0]


def _moments(model: nn.Module, targets: Mapping[str, Target], batches: list) -> dict[str, InputMoments]:
    """The second moments of the inputs of each of these layers, over all batches."""
    found = {}
    for name, target in targets.items():
        features = target.shape[0 if target.transposed else 1]
        found[name] = InputMoments(features, model.get_parameter(name).device)
    _run(model, targets, batches, lambda name, inputs, tokens: found[name].add(inputs, tokens))
    return found


def _run(model: nn.Module, names: Iterable[str], batches: list, take: Callable) -> None:
    """Calls the model with all batches, and `take` with the inputs of these weights' layers and the padding's mask."""
    tokens = None
    device = next(model.parameters()).device
    padded = not getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    with ExitStack() as hooks:
        for name in names:
            if name.endswith(".weight"):
                layer = model.get_submodule(name.removesuffix(".weight"))
                hook = layer.register_forward_pre_hook(lambda _, inputs, name=name: take(name, inputs[0], tokens))
                hooks.enter_context(hook)
        for batch in batches:
            batch = {key: value.to(device) if torch.is_tensor(value) else value for key, value in batch.items()}
            tokens = batch.get("attention_mask") if padded else None
            model(**batch)

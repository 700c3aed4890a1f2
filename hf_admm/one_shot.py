"""Prunes a model before training, layer by layer, so that each layer's output changes least (docs/one_shot.md)."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial

from torch import nn

from hf_admm.pruning.calibration import prune_in_blocks
from hf_admm.pruning.layerwise import prune_layer
from hf_admm.pruning.weights import PrunedWeights
from hf_admm.sparsity.patterns import OwnPattern, SparsityPattern, parse_pattern
from hf_admm.sparsity.targets import select_targets


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
            The model. It is as before if anything fails; until the end, a copy of the weights to prune is held. If
            FSDP2 shards it, every process calls this, with the same batches.
        batches (`Iterable[Mapping]`):
            What the model is called with, `model(**batch)`: about a thousand rows of the training data, fewer if they
            are long, such as the first batches of a data loader. Positions where `attention_mask` is 0 do not count,
            except in encoder-decoder models, whose decoder has other positions.
        sparsity_pattern (`str`, *optional*, defaults to `"2:4"`):
            `"N:M"`, `"RxC:K"` or a density.
        sparsity_include (`list[str]` or `str`, *optional*):
            As in [`ADMMTrainingArguments`].
        sparsity_exclude (`list[str]` or `str`, *optional*):
            As there.

    Returns:
        [`OneShotReport`]: How much of each layer's output was changed.

    Raises:
        `ValueError`: If the pattern is `"own"` or none, if there is no batch, if a weight to prune is not that of a
            linear layer whose `forward` the batches reach (all such are named), or if inputs are not finite.

    Example:

    ```python
    from torch.utils.data import DataLoader
    from transformers import DataCollatorWithPadding

    from hf_admm import ADMMTrainer, ADMMTrainingArguments, prune_one_shot

    batches = list(DataLoader(train, batch_size=8, collate_fn=DataCollatorWithPadding(tokenizer)))[:128]
    print(prune_one_shot(model, batches, "2:4").table())
    args = ADMMTrainingArguments("out", sparsity_pattern="2:4", learning_rate=1e-4)  # its zeros stay
    ADMMTrainer(model, args, train_dataset=train).train()
    ```
    """
    pattern = parse_pattern(sparsity_pattern)
    if isinstance(pattern, OwnPattern):
        raise ValueError('sparsity_pattern="own" keeps zeros and makes none. Give N:M, RxC:K or a density.')
    targets = select_targets(model, pattern, sparsity_include, sparsity_exclude).targets
    errors = prune_in_blocks(PrunedWeights(model, pattern, targets), batches, partial(prune_layer, pattern=pattern))
    return OneShotReport(pattern, errors)

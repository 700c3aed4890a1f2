"""What the cut at the switch does to the output of a layer."""

from collections.abc import Sequence

import torch
from torch import nn

from hf_admm import parse_pattern, select_targets, sparsity_mask
from hf_admm.visualization.activations import Watched


def pruned_names(model: nn.Module, pattern: str) -> list[str]:
    """The weights that are pruned by default."""
    return list(select_targets(model, parse_pattern(pattern)).targets)


@torch.no_grad()
def project(model: nn.Module, pattern: str) -> None:
    """Cuts what the switch cuts, in place."""
    parsed = parse_pattern(pattern)
    for name, target in select_targets(model, parsed).targets.items():
        weight = model.get_parameter(name)
        weight.masked_fill_(~sparsity_mask(weight, parsed, target.transposed), 0)


@torch.no_grad()
def cut_figures(
    before: nn.Module, after: nn.Module, pattern: str, batches: Sequence[dict]
) -> dict[str, dict[str, float]]:
    """
    What a cut changes of the output of each pruned layer, bias included.

    Args:
        before (`nn.Module`), after (`nn.Module`):
            The model with its weights whole, and cut.
        pattern (`str`), batches (`Sequence[dict]`):
            As [`~hf_admm.visualization.activations.layer_inputs`] takes them.

    Returns:
        `dict`: For each weight, relative to the norm of the output before: `own`, the change by this layer's cut
        alone, its input as before; `through`, the change when all layers are cut.
    """
    names = pruned_names(before, pattern)
    sums = {name: [0.0, 0.0, 0.0] for name in names}
    before.eval(), after.eval()
    with Watched(before, names) as whole, Watched(after, names) as cut:
        for batch in batches:
            before(**batch), after(**batch)
            for name in names:
                output, weight = whole.outputs[name], cut.layers[name]
                alone = weight.forward(whole.inputs[name])
                for place, part in enumerate((output, output - alone, output - cut.outputs[name])):
                    sums[name][place] += part.double().square().sum().item()
    return {
        name: {"own": (own / norm) ** 0.5 if norm else 0.0, "through": (through / norm) ** 0.5 if norm else 0.0}
        for name, (norm, own, through) in sums.items()
    }

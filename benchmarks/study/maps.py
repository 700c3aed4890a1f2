"""Activation maps: how much of them is near zero, where, and what the cut at the switch does to a layer's output."""

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from hf_admm import parse_pattern, select_targets, sparsity_mask


NEAR = 0.05  # of the layer's root mean square
REGIONS = {"1x4": (1, 4), "4x4": (4, 4)}  # tokens by features


def map_figures(maps: Sequence[torch.Tensor], near: float = NEAR) -> dict:
    """
    Describes the activations of one layer.

    Args:
        maps (`Sequence[torch.Tensor]`):
            A matrix of tokens by features for each row of the data.
        near (`float`, *optional*, defaults to 0.05):
            What counts as near zero, as a share of the root mean square of all activations of the layer.

    Returns:
        `dict`: `rms`; `near_zero`, the share of near-zero activations; `gini`, the Gini coefficient of the magnitudes;
        and for each kind of region `mean_share` (of near-zero activations in a region, over whole regions alone),
        `all_near_zero` (the share of regions with nothing else) and `by_chance` (what that would be if near-zero
        activations lay anywhere).
    """
    every = torch.cat([matrix.flatten() for matrix in maps]).double()
    rms = every.square().mean().sqrt().item()
    found = {"rms": rms, "near_zero": (every.abs() < near * rms).double().mean().item(), "gini": gini(every)}
    for name, (rows, columns) in REGIONS.items():
        shares = torch.cat([_shares(matrix.double().abs() < near * rms, rows, columns) for matrix in maps])
        mean = shares.mean().item() if len(shares) else None
        found[name] = {
            "mean_share": mean,
            "all_near_zero": (shares == 1).double().mean().item() if len(shares) else None,
            "by_chance": None if mean is None else mean ** (rows * columns),
        }
    return found


def _shares(near: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    height, width = near.shape[0] // rows, near.shape[1] // columns
    whole = near[: height * rows, : width * columns].double()
    return whole.reshape(height, rows, width, columns).mean(dim=(1, 3)).flatten()


def gini(values: torch.Tensor) -> float:
    """The Gini coefficient of magnitudes: 0 if all are equal, near 1 if few hold everything."""
    ordered = values.abs().double().flatten().sort().values
    count, total = len(ordered), ordered.sum().item()
    if not total:
        return 0.0
    ranks = torch.arange(1, count + 1, dtype=torch.float64, device=ordered.device)
    return (2 * (ranks * ordered).sum().item() / (count * total)) - (count + 1) / count


class Watched:
    """
    Within it, the inputs and outputs of linear layers are kept, by the names of their weights.

    Args:
        model (`nn.Module`):
            The model.
        names (`Iterable[str]`):
            The weights.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]):
        self.layers = {name: model.get_submodule(name.removesuffix(".weight")) for name in names}
        self.inputs: dict[str, torch.Tensor] = {}
        self.outputs: dict[str, torch.Tensor] = {}

    def __enter__(self):
        self._hooks = [layer.register_forward_hook(self._hook(name)) for name, layer in self.layers.items()]
        return self

    def __exit__(self, *_):
        for hook in self._hooks:
            hook.remove()

    def _hook(self, name: str):
        def keep(layer, inputs, output):
            self.inputs[name], self.outputs[name] = inputs[0].detach(), output.detach()

        return keep


def pruned_names(model: nn.Module, pattern: str) -> list[str]:
    """The weights that are pruned by default."""
    return list(select_targets(model, parse_pattern(pattern)).targets)


@torch.no_grad()
def layer_figures(model: nn.Module, pattern: str, batches: Sequence[dict], near: float = NEAR) -> dict[str, dict]:
    """
    The figures of the input of each pruned layer.

    Args:
        model (`nn.Module`):
            The model.
        pattern (`str`):
            Says which layers are pruned.
        batches (`Sequence[dict]`):
            The model's inputs, one row each: padding would be part of the maps.
        near (`float`, *optional*, defaults to 0.05):
            See [`map_figures`].
    """
    names = pruned_names(model, pattern)
    maps: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    model.eval()
    with Watched(model, names) as watched:
        for batch in batches:
            model(**batch)
            for name in names:
                maps[name].append(watched.inputs[name][0])
    return {name: map_figures(found, near) for name, found in maps.items()}


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
            As [`layer_figures`] takes them.

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


def kind(name: str) -> str:
    """What layers of a model have in common at every depth: the name from behind the first number."""
    parts = name.removesuffix(".weight").split(".")
    depth = next((i for i, part in enumerate(parts) if part.isdigit()), -1)
    return ".".join(parts[depth + 1 :])


def by_kind(layers: dict[str, dict]) -> dict[str, dict]:
    """Means over depth of figures of layers, nested ones included."""
    groups: dict[str, list[dict]] = {}
    for name, found in layers.items():
        groups.setdefault(kind(name), []).append(found)
    return {name: _mean(found) for name, found in groups.items()}


def _mean(found: Sequence[dict]) -> dict:
    means = {}
    for name, value in found[0].items():
        values = [item[name] for item in found]
        means[name] = (
            _mean(values) if isinstance(value, dict) else None if None in values else sum(values) / len(values)
        )
    return means

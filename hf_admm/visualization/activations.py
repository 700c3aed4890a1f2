"""Activation maps: how much of them is near zero, and where."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn


NEAR = 0.05  # of the layer's root mean square
REGIONS = {"1x4": (1, 4), "4x4": (4, 4)}  # tokens by features


@dataclass(frozen=True)
class MapComparison:
    """
    The activation maps of a dense and of a sparse model, on the same rows.

    Args:
        against (`str`):
            What the dense model is.
        rows (`int`):
            How many rows of data they were taken on.
        dense (`dict[str, dict]`), sparse (`dict[str, dict]`):
            The figures of each layer, see [`map_figures`].
        layer (`str`):
            The weight whose maps are shown.
        dense_map (`torch.Tensor`), sparse_map (`torch.Tensor`):
            Those of the first row, tokens by features.
    """

    against: str
    rows: int
    dense: dict[str, dict]
    sparse: dict[str, dict]
    layer: str
    dense_map: torch.Tensor
    sparse_map: torch.Tensor


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


@torch.no_grad()
def layer_inputs(model: nn.Module, names: Iterable[str], batches: Sequence[dict]) -> dict[str, list[torch.Tensor]]:
    """
    The activation maps of layers: what their weights multiply.

    Args:
        model (`nn.Module`):
            The model, which is left in its mode.
        names (`Iterable[str]`):
            The weights of linear layers.
        batches (`Sequence[dict]`):
            The model's inputs, one row each: padding would be part of the maps.

    Returns:
        `dict[str, list[torch.Tensor]]`: For each weight a matrix of tokens by features for each row.
    """
    maps: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with Watched(model, maps) as watched:
            for batch in batches:
                watched.inputs.clear()
                model(**batch)
                for name, matrix in watched.inputs.items():  # a layer that is left out of this row has none
                    maps[name].append(matrix.reshape(-1, matrix.shape[-1]))
    finally:
        for module, training in modes.items():
            module.training = training
    return {name: found for name, found in maps.items() if found}


def layer_figures(
    model: nn.Module, names: Iterable[str], batches: Sequence[dict], near: float = NEAR
) -> dict[str, dict]:
    """
    The figures of the input of each of some layers.

    Args:
        model (`nn.Module`), names (`Iterable[str]`), batches (`Sequence[dict]`):
            As [`layer_inputs`] takes them.
        near (`float`, *optional*, defaults to 0.05):
            See [`map_figures`].

    Returns:
        `dict[str, dict]`: What [`map_figures`] says of each.
    """
    return {name: map_figures(found, near) for name, found in layer_inputs(model, names, batches).items()}


def compare_maps(dense: nn.Module, sparse: nn.Module, names: Iterable[str], batches: Sequence[dict], against: str):
    """
    The activation maps of two models. Shown are those of the layer that has most near-zero inputs in the dense one.

    Args:
        dense (`nn.Module`), sparse (`nn.Module`), names (`Iterable[str]`), batches (`Sequence[dict]`):
            As [`layer_inputs`] takes them.
        against (`str`):
            What the dense model is.

    Returns:
        [`MapComparison`]
    """
    maps = [layer_inputs(model, names, batches) for model in (dense, sparse)]
    shared = [name for name in maps[0] if name in maps[1]]
    figures = [{name: map_figures([m.float() for m in found[name]]) for name in shared} for found in maps]
    layer = max(shared, key=lambda name: figures[0][name]["near_zero"])
    shown = [found[layer][0].float().cpu() for found in maps]
    return MapComparison(against, len(batches), *figures, layer, *shown)

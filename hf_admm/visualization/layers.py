"""Where a weight stands in a model, by its name."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Place(NamedTuple):
    """The stack of blocks that a weight is in, the number of its block (`None` outside of blocks), and its kind."""

    stack: str
    depth: int | None
    kind: str


def place(name: str) -> Place:
    """
    Takes the name of a weight apart at its first number.

    Args:
        name (`str`):
            Name of the parameter: `"bert.encoder.layer.3.attention.self.query.weight"`.

    Returns:
        [`Place`]: `("bert.encoder.layer", 3, "attention.self.query")`.
    """
    parts = name.removesuffix(".weight").split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if at is None or at == len(parts) - 1:
        return Place("", None, ".".join(parts))
    return Place(".".join(parts[:at]), int(parts[at]), ".".join(parts[at + 1 :]))


def row_labels(names: Iterable[str]) -> dict[tuple[str, str], str]:
    """
    Labels for the kinds of weights, in the order of the model.

    Args:
        names (`Iterable[str]`):
            Names of weights.

    Returns:
        `dict[tuple[str, str], str]`: By stack and kind, the kind; where there are several stacks, such as an encoder
        and a decoder, with what tells them apart.
    """
    keys = list(dict.fromkeys((found.stack, found.kind) for found in map(place, names)))
    stacks = list(dict.fromkeys(stack for stack, _ in keys if stack))
    if len(stacks) < 2:
        return {key: key[1] for key in keys}
    short = dict(zip(stacks, _telling(stacks), strict=True))
    return {(stack, kind): f"{short[stack]}: {kind}" if stack else kind for stack, kind in keys}


def _telling(stacks: Sequence[str]) -> list[str]:
    """Dotted names without the first and last parts that all share."""
    parts = [stack.split(".") for stack in stacks]
    while all(len(part) > 1 for part in parts) and len({part[-1] for part in parts}) == 1:
        parts = [part[:-1] for part in parts]
    while all(len(part) > 1 for part in parts) and len({part[0] for part in parts}) == 1:
        parts = [part[1:] for part in parts]
    return [".".join(part) for part in parts]


def kind(name: str) -> str:
    """What layers of a model have in common at every depth: the name from behind the first number."""
    return place(name).kind


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

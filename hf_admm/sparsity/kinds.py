"""Layers by their kind: what is told apart by the number of a block alone is of one kind."""

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class LayerKind:
    """
    The weights of one kind and shape.

    Args:
        name (`str`):
            What their names have in common behind the number of the block, such as `"attention.self.query"`.
        count (`int`):
            How many there are.
        shape (`tuple[int, ...]`):
            The shape of each, as stored.
    """

    name: str
    count: int
    shape: tuple[int, ...]

    @property
    def entries(self) -> int:
        """Of all of them together."""
        return self.count * math.prod(self.shape)

    @property
    def shape_text(self) -> str:
        """`"1536x384"`."""
        return "x".join(map(str, self.shape))


def kind_of(name: str) -> str:
    """
    The kind of a weight.

    Args:
        name (`str`):
            Name of its parameter: `"bert.encoder.layer.3.attention.self.query.weight"`.

    Returns:
        `str`: The name of its layer behind the last number of a block: `"attention.self.query"`. A number that the
        name ends with is the place of a layer in its block, and stays: `"mlp.0"`.
    """
    parts = name.removesuffix(".weight").split(".")
    numbered = [place for place, part in enumerate(parts[:-1]) if part.isdigit()]
    return ".".join(parts[numbered[-1] + 1 :] if numbered else parts)


def layer_kinds(shapes: Mapping[str, tuple[int, ...]]) -> list[LayerKind]:
    """
    Weights by kind.

    Args:
        shapes (`Mapping[str, tuple[int, ...]]`):
            The shape of each weight, by the name of its parameter.

    Returns:
        `list[LayerKind]`: The kinds in the order of their first weights; one of several shapes is several.
    """
    counts: dict[tuple[str, tuple[int, ...]], int] = {}
    for name, shape in shapes.items():
        key = kind_of(name), tuple(shape)
        counts[key] = counts.get(key, 0) + 1
    return [LayerKind(name, count, shape) for (name, shape), count in counts.items()]

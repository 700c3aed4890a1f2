"""The figures of weights and activations: heat maps, masks, and parts of matrices."""

import math
from collections import Counter

import numpy as np

from hf_admm.sparsity.patterns import parse_pattern
from hf_admm.sparsity.projections import kept_per_group
from hf_admm.visualization.activations import MapComparison
from hf_admm.visualization.drawing import MAGNITUDES, new_figure
from hf_admm.visualization.layers import by_kind, place, row_labels
from hf_admm.visualization.weights import Sample, WeightFigures


_MOST_NUMBERED = 12  # columns of a heat map whose cells have room for a number
_LONGEST_LABEL = 24
SHOWN_TOKENS, SHOWN_FEATURES = 24, 64


def sparsity_map(weights: WeightFigures, theme):
    """The share of zeros of each weight, by block and kind."""
    values = {layer.audit.name: 100 * layer.sparsity for layer in weights.layers if layer.audit.size}
    return _heat_map(weights, values, theme, "zeros, %", most=100)


def loss_map(weights: WeightFigures, theme):
    """The share of the norm of the dense weights that was lost with the zeros, by block and kind."""
    values = {layer.audit.name: 100 * layer.lost for layer in weights.lost}
    return _heat_map(weights, values, theme, "magnitude lost, % of the norm")


def heat_map_cells(weights: WeightFigures, values: dict[str, float]) -> tuple[list[str], list[int | None], np.ndarray]:
    """
    Values of weights in a grid.

    Args:
        weights ([`WeightFigures`]):
            Says which kinds there are: those of which a weight is sparse.
        values (`dict[str, float]`):
            By weight.

    Returns:
        `tuple`: The label of each row, the block of each column (`None` for what is outside of blocks), and the
        values, NaN where there is none.
    """
    labels = row_labels(audit.name for audit in weights.report.sparse)
    places = {layer.audit.name: place(layer.audit.name) for layer in weights.layers if layer.audit.size}
    places = {name: where for name, where in places.items() if (where.stack, where.kind) in labels}
    columns = sorted(
        {where.depth for where in places.values()}, key=lambda depth: math.inf if depth is None else depth
    )
    cells = np.full((len(labels), len(columns)), np.nan)
    rows = {key: row for row, key in enumerate(labels)}
    for name, where in places.items():
        cells[rows[where.stack, where.kind], columns.index(where.depth)] = values.get(name, np.nan)
    return list(labels.values()), columns, cells


def _heat_map(weights: WeightFigures, values: dict[str, float], theme, title: str, most: float | None = None):
    import matplotlib

    labels, columns, cells = heat_map_cells(weights, values)
    figure, axes = new_figure(1.1 + 0.27 * len(labels))
    most = most or max(np.nanmax(cells), 1e-9)
    colors = matplotlib.colormaps[MAGNITUDES].with_extremes(bad=theme.ground)
    image = axes.imshow(cells, cmap=colors, vmin=0, vmax=most, aspect="auto", interpolation="nearest")
    step = max(1, math.ceil(len(columns) / _MOST_NUMBERED))
    ticks = range(0, len(columns), step)
    axes.set_xticks(ticks, ["-" if columns[tick] is None else str(columns[tick]) for tick in ticks])
    axes.set_yticks(range(len(labels)), [_shortened(label) for label in labels], fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("block")
    if len(columns) <= _MOST_NUMBERED:
        for (row, column), value in np.ndenumerate(cells):
            known = np.isfinite(value)
            color = theme.muted if not known else "white" if value < 0.5 * most else "black"
            text = "-" if not known else f"{value:.0f}" if value >= 9.95 or value == 0 else f"{value:.1f}"
            axes.text(column, row, text, ha="center", va="center", fontsize=7, color=color)
    bar = figure.colorbar(image, ax=axes, location="top", aspect=40, pad=0.02, shrink=0.9)
    bar.set_label(title)
    bar.outline.set_visible(False)
    return figure


def mask_bars(weights: WeightFigures, theme):
    """The masks that occur most, and how often."""
    sides, shown = weights.group_sides, most_masks(weights)
    total = weights.masks.total()
    figure, axes = new_figure(0.8 + len(shown) * (0.24 if sides[0] == 1 else 0.1 + 0.13 * sides[0]))
    shares = [100 * count / total for _, count in shown]
    axes.barh(range(len(shown)), shares, height=0.6, color=theme.colors[0])
    for row, share in enumerate(shares):
        axes.text(1, row, f"{share:.3g}", transform=axes.get_yaxis_transform(), ha="right", va="center", fontsize=8)
    axes.set_yticks(range(len(shown)), [mask_text(code, sides) for code, _ in shown], fontsize=8, linespacing=1.0)
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    even = 100 / possible_masks(weights.report.pattern)
    if even > 0.2 * max(shares):
        axes.axvline(even, color=theme.ink, linewidth=1, linestyle=(0, (2, 2)))
        place_at = {"transform": axes.get_xaxis_transform(), "ha": "center", "va": "bottom", "fontsize": 8}
        axes.text(even, 1.01, "equal shares", **place_at)
    axes.set_xlim(0, 1.2 * max(*shares, even if even > 0.2 * max(shares) else 0))
    axes.set_xlabel("% of the groups")
    return figure


def most_masks(weights: WeightFigures) -> list[tuple[int, int]]:
    """The masks to show, the most frequent first, with their counts: all of 2:4, and no more than fit a figure."""
    ordered = sorted(weights.masks.items(), key=lambda item: (-item[1], item[0]))
    return ordered[: 16 if weights.group_sides[0] == 1 else 8]


def possible_masks(pattern: str) -> int:
    """How many masks keep as many entries as the pattern says."""
    parsed = parse_pattern(pattern)
    return math.comb(parsed.group_size, kept_per_group(parsed, parsed.group_size))


def mask_text(code: int, sides: tuple[int, int]) -> str:
    """A mask in squares, full where an entry is kept: a line for each output."""
    rows, columns = sides
    return "\n".join(
        "".join("■" if code >> (row * columns + column) & 1 else "□" for column in range(columns))
        for row in range(rows)
    )


def matrix_picture(sample: Sample, theme):
    """Magnitudes of a part of a weight, before and after, with a dot where it is zero."""
    parts = {"dense, before training": sample.before, "sparse": sample.after}
    parts = {title: part.abs().numpy() for title, part in parts.items() if part is not None}
    most = max(part.max() for part in parts.values())
    return _matrices(parts, theme, most, "|weight|", ("input", "output"), dots=True)


def map_picture(maps: MapComparison, theme):
    """Magnitudes of the inputs of a layer on one row, in the dense and in the sparse model."""
    parts = {f"dense ({maps.against})": maps.dense_map, "sparse": maps.sparse_map}
    parts = {title: part[:SHOWN_TOKENS, :SHOWN_FEATURES].abs().numpy() for title, part in parts.items()}
    # A few activations are huge: beyond this, all are shown alike.
    most = float(np.quantile(np.concatenate([part.ravel() for part in parts.values()]), 0.98))
    return _matrices(parts, theme, most, "|activation|", ("feature", "token"), extend="max")


def _matrices(parts: dict[str, np.ndarray], theme, most: float, label: str, names, dots=False, extend="neither"):
    from matplotlib.ticker import MaxNLocator

    rows, columns = next(iter(parts.values())).shape
    height = max(0.7, 3.9 * rows / columns)
    figure, found = new_figure(0.9 + (height + 0.35) * len(parts), len(parts), sharex=True, squeeze=False)
    for axes, (title, part) in zip(found[:, 0], parts.items(), strict=True):
        image = axes.imshow(
            part, cmap=MAGNITUDES, vmin=0, vmax=max(most, 1e-12), aspect="auto", interpolation="nearest"
        )
        if dots:
            axes.plot(*reversed(np.nonzero(part == 0)), marker=".", markersize=2, linestyle="none", color="white")
        axes.set_title(title)
        axes.set_ylabel(names[1])
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    found[-1, 0].set_xlabel(names[0])
    bar = figure.colorbar(image, ax=found[:, 0], location="bottom", aspect=40, shrink=0.9, extend=extend)
    bar.set_label(label)
    return figure


def region_dots(maps: MapComparison, theme):
    """The share of near-zero activations, and of regions that hold nothing else, by kind of layer."""
    dense, sparse = by_kind(maps.dense), by_kind(maps.sparse)
    kinds = list(dense)
    titles = {"near_zero": "near zero, % of the activations", "1x4": "1x4 regions all near zero, %"}
    figure, found = new_figure(1.1 + 2 * (0.4 + 0.25 * len(kinds)), 2)
    for axes, (key, title) in zip(found, titles.items(), strict=True):
        most = 0.0
        for shown, marker, label, face, shift in (
            (dense, "o", "dense", "none", -0.17),
            (sparse, "s", "sparse", theme.colors[1], 0.17),
        ):
            values = [_share(shown[kind], key) for kind in kinds]
            most, color = max(most, *values), theme.ink if face == "none" else face
            style = {"marker": marker, "markersize": 5, "linestyle": "none", "color": color}
            rows = [row + shift for row in range(len(kinds))]
            axes.plot(values, rows, markerfacecolor=face, markeredgewidth=1.3, label=label, zorder=3, **style)
        if key != "near_zero":
            values = [100 * (sparse[kind][key]["by_chance"] or 0) for kind in kinds]
            style = {"marker": "|", "markersize": 9, "linestyle": "none", "color": theme.ink}
            axes.plot(values, range(len(kinds)), label="sparse, if scattered by chance", **style)
            most = max(most, *values)
        axes.set_yticks(range(len(kinds)), [_shortened(kind) for kind in kinds], fontsize=8)
        axes.set_ylim(len(kinds) - 0.5, -0.5)
        axes.set_xlim(-0.01 * most, 1.06 * most or 1)
        axes.grid(True)
        axes.set_axisbelow(True)
        axes.set_title(title)
    handles, labels = found[1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure


def _share(figures: dict, key: str) -> float:
    value = figures[key] if key == "near_zero" else figures[key]["all_near_zero"]
    return 100 * (value or 0)


def _shortened(label: str) -> str:
    """A label without its middle: the stack that it begins with tells as much as the end."""
    return label if len(label) <= _LONGEST_LABEL else f"{label[:7]}...{label[10 - _LONGEST_LABEL :]}"


def mask_summary(masks: Counter, pattern: str) -> str:
    """How many masks occur, of how many that may."""
    return f"{len(masks):,} different masks occur, and {pattern} has {possible_masks(pattern):,} that are full"

"""What the page shows of a run: its headline, its figures with their words, and what is left out."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from hf_admm.reporting.tables import size_text
from hf_admm.visualization import curves, pictures
from hf_admm.visualization.activations import NEAR
from hf_admm.visualization.gathering import RunFigures, finite


@dataclass(frozen=True)
class Picture:
    """
    A figure of the page.

    Args:
        name (`str`):
            Of its file, without the ending.
        title (`str`), caption (`str`), alt (`str`):
            Its words, plain text. The last says in numbers what the figure shows.
        draw (`Callable`):
            Takes a theme, returns the figure.
    """

    name: str
    title: str
    caption: str
    alt: str
    draw: Callable


def headline(found: RunFigures) -> list[tuple[str, str, str]]:
    """
    What came out of the run.

    Args:
        found ([`RunFigures`]):
            What there is of the run.

    Returns:
        `list[tuple[str, str, str]]`: What it is, its value, and a word on it.
    """
    facts, metric = _metrics(found), found.results.get("metric")
    weights = found.weights
    if weights is not None and weights.report.sparse:
        report = weights.report
        groups = sum(audit.groups for audit in report.sparse)
        facts += [
            ("sparsity", f"{100 * report.sparsity:.2f} %", f"zeros in the {len(report.sparse)} pruned weights"),
            ("broken groups", f"{report.violations:,}", f"of {groups:,}, pattern {report.pattern}"),
        ]
        packed = f"{size_text(weights.packed)} with pruned weights as values and a bit for each entry"
        facts.append(("size stored", size_text(weights.stored), packed))
    elif weights is not None:
        facts.append(("size stored", size_text(weights.stored), "no weight is sparse"))
    cut = found.logs.series("admm/switch_residual")[1] if found.logs else []
    if cut:
        facts.append(("cut off at the switch", f"{100 * cut[0]:.3g} %", "of the norm of the pruned weights"))
    if metric is None and found.results and not facts:
        facts.append(("steps", str(found.results.get("steps", "-")), ""))
    return facts


def _metrics(found: RunFigures) -> list[tuple[str, str, str]]:
    metric = found.results.get("metric")
    scores = {kind: finite((found.results.get(kind) or {}).get(metric)) for kind in ("dense", "sparse")}
    if metric is not None and any(score is not None for score in scores.values()):
        dense, sparse = scores["dense"], scores["sparse"]
        facts = [("dense", "-" if dense is None else f"{dense:.4f}", metric if dense is not None else "not trained")]
        if sparse is not None:
            word = metric if dense is None else f"{metric}, {sparse - dense:+.4f} to dense"
            facts.append((f"sparse {found.pattern or ''}".strip(), f"{sparse:.4f}", word))
        return facts
    if found.logs is None or not found.logs.metrics:
        return []
    name = found.logs.metrics[0]
    steps, values = found.logs.series(name)
    kind = "sparse" if found.pattern else "last evaluation"
    return [(kind, f"{values[-1]:.4f}", f"{name.removeprefix('eval_')} at step {steps[-1]}")]


def sections(found: RunFigures) -> dict[str, list[Picture]]:
    """
    The figures of a run by section, without those that nothing is there for.

    Args:
        found ([`RunFigures`]):
            What there is of the run.

    Returns:
        `dict[str, list[Picture]]`: By the title of the section.
    """
    made = {
        "How it went": _logged(found),
        "Where the zeros are": _weights(found),
        "What they do to activations": _activations(found),
    }
    return {title: shown for title, shown in made.items() if shown}


def _logged(found: RunFigures) -> list[Picture]:
    logs = found.logs
    if logs is None:
        return []
    switch = "" if logs.switch_step is None else f" Phase 2 begins after step {logs.switch_step}."
    table = [
        ("metrics", "Metric of the sparse weights" if found.pattern else "Metric over time", "metric over time",
         "What each evaluation measured. In both phases it is taken on weights that obey the pattern."
         if found.pattern else "What each evaluation measured.", logs.metrics[:4], curves.metric_curves),
        ("residuals", "Distance to the pattern", "residuals",
         "The norm of what the projection would cut off, as a share of the norm of the weights. It should be below "
         "0.05 when a phase 1 with a penalty ends.", ["admm/primal_residual", "admm/switch_residual"],
         curves.residual_curve),
        ("mask_flips", "Mask flips", "mask flips", "How many entries changed their place in the mask at its last "
         "update. It should come to rest within a phase 1 with a penalty.", ["admm/mask_flips"], curves.flips_curve),
        ("learning_rate", "Learning rate", "learning rate", "Each phase has a schedule of its own."
         if logs.switch_step is not None else "As it was logged.", ["learning_rate"], curves.rate_curve),
        ("loss", "Training loss", "loss", "The loss of the task, without the penalty.", ["loss"], curves.loss_curve),
    ]  # fmt: skip
    return [
        Picture(name, title, caption, f"{title} over {logs.last_step} steps.{_ends(found, keys)}{switch}",
                partial(draw, logs))
        for name, title, part, caption, keys, draw in table if part not in found.missing
    ]  # fmt: skip


def _ends(found: RunFigures, keys: list[str]) -> str:
    """From where to where curves go, for those who do not see them."""
    told = ""
    for key in keys:
        steps, values = found.logs.series(key)
        if not steps:
            continue
        name = key.rpartition("/")[2].removeprefix("eval_").replace("_", " ")
        if values[0] == values[-1]:
            told += f" {name}: {values[0]:.4g}."
        else:
            told += f" {name}: {values[0]:.4g} at step {steps[0]}, {values[-1]:.4g} at step {steps[-1]}."
    return told


def _weights(found: RunFigures) -> list[Picture]:
    weights = found.weights
    if weights is None or not weights.report.sparse:
        return []
    report, shown = weights.report, []
    shown.append(Picture(
        "sparsity_by_layer", "Sparsity by layer", "The share of zeros of each weight: kinds of layers by blocks.",
        f"{len(report.sparse)} sparse weights, {100 * report.sparsity:.2f} % zeros in all.",
        partial(pictures.sparsity_map, weights),
    ))  # fmt: skip
    if weights.lost:
        lost = sorted(weights.lost, key=lambda layer: layer.lost)
        least = sum(layer.least for layer in lost) / len(lost)
        mean = sum(layer.lost for layer in lost) / len(lost)
        shown.append(Picture(
            "magnitude_lost", "Magnitude lost", "The norm of what a weight held before training where it is zero now, "
            f"as a share of its norm: {100 * mean:.1f} % on average. Masks chosen by magnitude alone, before "
            f"training, would lose {100 * least:.1f} %.",
            f"From {100 * lost[0].lost:.1f} % in {lost[0].audit.name} to {100 * lost[-1].lost:.1f} % in "
            f"{lost[-1].audit.name}.", partial(pictures.loss_map, weights),
        ))  # fmt: skip
    if weights.masks:
        total, most = weights.masks.total(), pictures.most_masks(weights)
        share = sum(count for _, count in most) / total
        flat = (1, math.prod(weights.group_sides))
        listed = ", ".join(f"{pictures.mask_text(code, flat)} {100 * count / total:.1f} %" for code, count in most[:6])
        shown.append(Picture(
            "masks", "Masks that occur", f"{pictures.mask_summary(weights.masks, report.pattern)}. "
            f"{len(most)} are shown, in {100 * share:.3g} % of {total:,} groups; a full square is an entry kept.",
            f"Share of the groups: {listed}.", partial(pictures.mask_bars, weights),
        ))  # fmt: skip
    sample = weights.sample
    if sample is not None:
        rows, columns = sample.after.shape
        before = "before training and " if sample.before is not None else ""
        shown.append(Picture(
            "matrix", "One weight before and after" if before else "One weight",
            f"The first {rows} outputs and {columns} inputs of {sample.name}. White dots are exact zeros.",
            f"Magnitudes of a part of {sample.name} {before}now, of which {int((sample.after == 0).sum())} of "
            f"{sample.after.numel()} entries are zero.", partial(pictures.matrix_picture, sample),
        ))  # fmt: skip
    return shown


def _activations(found: RunFigures) -> list[Picture]:
    maps = found.maps
    if maps is None:
        return []
    dense, sparse = maps.dense[maps.layer], maps.sparse[maps.layer]
    near = f"{100 * dense['near_zero']:.1f} % near zero dense, {100 * sparse['near_zero']:.1f} % sparse"
    regions = [found["1x4"]["all_near_zero"] for found in (dense, sparse)]
    told = f" Regions of 1x4 all near zero: {100 * regions[0]:.2g} % dense, {100 * regions[1]:.2g} % sparse."
    tokens, features = (min(size, most) for size, most in zip(
        maps.sparse_map.shape, (pictures.SHOWN_TOKENS, pictures.SHOWN_FEATURES), strict=True))  # fmt: skip
    return [
        Picture("activation_map", "One activation map", f"The input of {maps.layer} on the first row: {tokens} tokens "
                f"by {features} features. In all rows, {near}.", near.capitalize() + f" in {maps.layer}.{told}",
                partial(pictures.map_picture, maps)),
        Picture("regional_sparsity", "Regional sparsity", f"Near zero is below {NEAR:g} of the root mean square of a "
                f"layer's inputs. A region is one token by four features; if more of them are all near zero than by "
                f"chance, the zeros lie together. {maps.rows} rows, dense is the model {_against(maps.against)}.",
                f"In {maps.layer}: {near}.{told}", partial(pictures.region_dots, maps)),
    ]  # fmt: skip


def _against(against: str) -> str:
    return "before training" if against == "before training" else "that was trained dense with equal steps"

"""Which weights of a model are pruned, and why the others are not."""

import math
from collections import Counter
from dataclasses import dataclass

from torch import nn

from hf_admm.sparsity.heads import reasons_by_default
from hf_admm.sparsity.matrices import FROZEN, clean_name, matrices, named_parameters
from hf_admm.sparsity.naming import check_exclude, check_include, exclude_advice, matches
from hf_admm.sparsity.patterns import SparsityPattern
from hf_admm.sparsity.refusals import nothing_matched, refuse_frozen_base, refuse_quantized


__all__ = ["FROZEN", "Target", "TargetSelection", "clean_name", "matches", "named_parameters", "select_targets"]


# Less than this share of a model's matrices is worth a warning.
_SMALL_SHARE = 0.1


@dataclass(frozen=True)
class Target:
    """
    A weight to prune.

    Args:
        name (`str`):
            Name of the parameter, as in `model.named_parameters()`.
        shape (`tuple[int, int]`):
            Shape as stored.
        transposed (`bool`):
            Whether it is stored as `(in_features, out_features)`, as GPT-2's `Conv1D` does.
    """

    name: str
    shape: tuple[int, int]
    transposed: bool


@dataclass(frozen=True)
class TargetSelection:
    """
    What [`select_targets`] decided on each matrix of a model.

    Args:
        targets (`dict[str, Target]`):
            The weights to prune, by parameter name, in the order of the model.
        left_out (`dict[str, tuple[tuple[int, ...], str]]`):
            Shape and reason for each matrix that stays dense.
    """

    targets: dict[str, Target]
    left_out: dict[str, tuple[tuple[int, ...], str]]

    def table(self) -> str:
        """A plain-text table: name, shape, pruned or why not, and a summary line."""
        rows = [(name, target.shape, "pruned") for name, target in self.targets.items()]
        rows += [(name, shape, reason) for name, (shape, reason) in self.left_out.items()]
        cells = [("weight", "shape", "pruned or why not")]
        cells += [(name, "x".join(map(str, shape)), reason) for name, shape, reason in rows]
        widths = [max(len(row[column]) for row in cells) for column in range(2)]
        lines = [f"{name:<{widths[0]}}  {shape:>{widths[1]}}  {reason}" for name, shape, reason in cells]
        return "\n".join([*lines, self.summary(), *filter(None, [self.warning()])])

    def summary(self) -> str:
        """One line: how many weights are pruned and their share of all, and how many are not, by reason."""
        pruned, _ = self._entries()
        share = f"{pruned:,} entries, {self.share():.1%} of all matrices"
        return f"{len(self.targets)} weights pruned ({share}); left dense: {self.reasons()}"

    def share(self) -> float:
        """The entries of the pruned weights as a share of those of all matrices."""
        pruned, total = self._entries()
        return pruned / max(total, 1)

    def reasons(self) -> str:
        """How many matrices stay dense for each reason: `"1 head, 3 embedding"`, or `"none"`."""
        reasons = Counter(reason for _, reason in self.left_out.values())
        return ", ".join(f"{count} {reason}" for reason, count in reasons.items()) or "none"

    def warning(self) -> str | None:
        """What should be said if next to nothing of the model is pruned: what is left out, and what can be done."""
        pruned, total = self._entries()
        if pruned >= _SMALL_SHARE * total:
            return None
        sizes: Counter[str] = Counter()
        for shape, reason in self.left_out.values():
            sizes[reason] += math.prod(shape)
        listing = ", ".join(f"{reason} ({size / total:.1%})" for reason, size in sizes.most_common())
        return (
            f"Only {pruned / total:.1%} of the entries of this model's matrices are pruned: it stays nearly as dense "
            f"as it was. Left out, the largest first: {listing}. Linear layers and nn.MultiheadAttention alone can be "
            "pruned. Those left out can be named with sparsity_include, unfrozen with requires_grad_(True), or no "
            "longer excluded."
        )

    def _entries(self) -> tuple[int, int]:
        """The entries that are pruned, and those of all matrices."""
        pruned = sum(math.prod(target.shape) for target in self.targets.values())
        return pruned, pruned + sum(math.prod(shape) for shape, _ in self.left_out.values())


def select_targets(
    model: nn.Module,
    pattern: SparsityPattern,
    include: list[str] | str | None = None,
    exclude: list[str] | str | None = None,
) -> TargetSelection:
    """
    Decides which weights of a model are pruned.

    By default these are the weights of every `nn.Linear`, `Conv1D` and `nn.MultiheadAttention` inside the model's
    layers, less heads, routers and adapters. Layers are the blocks in its lists of modules; a model without any counts
    as one layer, less the heads at its end. `include` replaces that default. What it names and can't be pruned (tied,
    frozen and parametrized weights, embeddings, convolutions, fused experts) is refused.

    Args:
        model (`nn.Module`):
            The model.
        pattern ([`SparsityPattern`]):
            The pattern, which must fit every target.
        include (`list[str]` or `str`, *optional*):
            Names of the modules to prune, in PEFT's convention (see [`matches`]). The name of an
            `nn.MultiheadAttention` stands for all of its weights; `in_proj_weight` for queries, keys and values alone.
        exclude (`list[str]` or `str`, *optional*):
            Names of the modules to leave dense, in the same convention. Wins over `include`.

    Returns:
        [`TargetSelection`]: The targets, and the reason for each matrix that is left out.

    Raises:
        `ValueError`: If the model is quantized or its base is frozen under adapters, if no layer matches, if a name
            matches none or what can't be pruned, or if the pattern does not fit a layer (all of them are named).
    """
    known = matrices(model)
    refuse_quantized(model)
    refuse_frozen_base(model, known)
    check_include(known, include, exclude)
    check_exclude(model, known, exclude)
    by_default = {} if include is not None else reasons_by_default(model)

    targets, left_out = {}, {}
    for name in named_parameters(model):
        if (matrix := known.get(name)) is None:
            continue
        if matrix.fault:
            reason = matrix.reason
        elif exclude is not None and any(matches(each, exclude) for each in matrix.names):
            reason = "excluded by sparsity_exclude"
        elif include is not None and not any(matches(each, include) for each in matrix.names):
            reason = "not in sparsity_include"
        else:
            reason = by_default.get(matrix.module) or matrix.reason
        shape = tuple(matrix.parameter.shape)
        if reason:
            left_out[name] = (shape, reason)
        else:
            targets[name] = Target(name, shape, matrix.transposed)

    selection = TargetSelection(targets, left_out)
    if not targets:
        raise ValueError(nothing_matched(model, left_out, include, exclude))
    _check_fit(selection, pattern, exclude)
    return selection


def _check_fit(selection: TargetSelection, pattern: SparsityPattern, exclude: list[str] | str | None) -> None:
    misfits = {}
    for name, target in selection.targets.items():
        out_features, in_features = reversed(target.shape) if target.transposed else target.shape
        if reason := pattern.misfit(out_features, in_features):
            misfits[name.removesuffix(".weight")] = reason
    if misfits:
        listing = "\n".join(f"  {name}: {reason}" for name, reason in misfits.items())
        advice = "Choose a pattern that divides them."
        if len(misfits) < len(selection.targets):
            flag = exclude_advice(misfits, exclude)
            advice = f"Leave them dense with {flag}, or choose a pattern that divides them."
        raise ValueError(
            f"Pattern {pattern} does not fit {len(misfits)} of {len(selection.targets)} layers:\n{listing}\n{advice}"
        )

"""Which weights of a model are pruned, and why the others are not."""

from torch import nn

from hf_admm.sparsity.heads import reasons_by_default
from hf_admm.sparsity.matrices import FROZEN, clean_name, matrices, named_parameters
from hf_admm.sparsity.naming import check_exclude, check_include, exclude_advice, matches
from hf_admm.sparsity.own import select_own
from hf_admm.sparsity.patterns import OwnPattern, SparsityPattern
from hf_admm.sparsity.refusals import nothing_matched, refuse_frozen_base, refuse_quantized
from hf_admm.sparsity.verdicts import Target, TargetSelection


__all__ = ["FROZEN", "Target", "TargetSelection", "clean_name", "matches", "named_parameters", "select_targets"]


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

    With [`OwnPattern`] these are the weights that are sparse already, see [`select_own`].

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
    refuse_quantized(model)
    if isinstance(pattern, OwnPattern):
        return select_own(model, include, exclude)
    known = matrices(model)
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

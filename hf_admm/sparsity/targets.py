"""Which weights of a model are pruned, and why the others are not."""

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_admm.sparsity.patterns import SparsityPattern


# Modules that map the last hidden state to a task or to a vocabulary: small, sensitive, and new in most fine-tuning
# runs.
HEADS = ("classifier", "pooler", "qa_outputs", "score", "lm_head")
# Routers of a mixture of experts: a few outputs that decide where every token goes.
ROUTERS = ("router", "gate", "router_gate", "shared_expert_gate")

FROZEN = "frozen"  # the reason to leave a weight that would be pruned, were it trained


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
        return "\n".join([*lines, self.summary()])

    def summary(self) -> str:
        """One line: how many weights are pruned and their share of all, and how many are not, by reason."""
        pruned = sum(math.prod(target.shape) for target in self.targets.values())
        matrices = pruned + sum(math.prod(shape) for shape, _ in self.left_out.values())
        reasons = Counter(reason for _, reason in self.left_out.values())
        dense = ", ".join(f"{count} {reason}" for reason, count in reasons.items()) or "none"
        share = f"{pruned:,} entries, {pruned / max(matrices, 1):.1%} of all matrices"
        return f"{len(self.targets)} weights pruned ({share}); left dense: {dense}"


def matches(name: str, names: list[str] | str) -> bool:
    """
    PEFT's convention: whether a module name is in a list of suffixes or fully matches a regular expression.

    Args:
        name (`str`):
            Full name of a module, such as `"encoder.layer.0.attention.self.query"`.
        names (`list[str]` or `str`):
            Name suffixes (`["query", "value"]`), or one regular expression.
    """
    if isinstance(names, str):
        return re.fullmatch(names, name) is not None
    return any(name == suffix or name.endswith(f".{suffix}") for suffix in names)


def select_targets(
    model: nn.Module,
    pattern: SparsityPattern,
    include: list[str] | str | None = None,
    exclude: list[str] | str | None = None,
) -> TargetSelection:
    """
    Decides which weights of a model are pruned.

    By default these are the weights of every `nn.Linear` and `Conv1D` inside the model's layers (its `nn.ModuleList`s;
    a model without any counts as one layer), less heads, routers and adapters. `include` replaces that default; tied
    and frozen weights are never pruned.

    Args:
        model (`nn.Module`):
            The model.
        pattern ([`SparsityPattern`]):
            The pattern, which must fit every target.
        include (`list[str]` or `str`, *optional*):
            Names of the modules to prune, in PEFT's convention (see [`matches`]).
        exclude (`list[str]` or `str`, *optional*):
            Names of the modules to leave dense, in the same convention.

    Returns:
        [`TargetSelection`]: The targets, and the reason for each matrix that is left out.

    Raises:
        `ValueError`: If the model is quantized or its base is frozen under adapters, if no layer matches, if a name
            matches none, or if the pattern does not fit a layer (all of them are named).
    """
    modules = {clean_name(name): module for name, module in model.named_modules()}
    linear = {name: module for name, module in modules.items() if isinstance(module, nn.Linear | Conv1D)}
    _refuse_quantized(model, linear)
    _refuse_frozen_base(model, linear)
    _check_names(linear, linear, include, "sparsity_include")
    # An embedding may be named too, though it stays dense anyway; a block of layers may not, see `matches`.
    layers = {name for name, module in modules.items() if getattr(module, "weight", None) is not None}
    _check_names(layers, linear, exclude, "sparsity_exclude")
    owners = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    stacks = [f"{name}." for name, module in modules.items() if isinstance(module, nn.ModuleList)]

    def reason_to_leave(name: str) -> str | None:
        weight = linear[name].weight
        if exclude is not None and matches(name, exclude):
            return "excluded by sparsity_exclude"
        if include is not None and not matches(name, include):
            return "not in sparsity_include"
        if include is None and (reason := _left_by_default(name, stacks)):
            return reason
        if owners[id(weight)] > 1:
            return "tied to another module"
        return None if weight.requires_grad else FROZEN

    targets, left_out = {}, {}
    for name, parameter in named_parameters(model).items():
        module = name.removesuffix(".weight")
        if parameter.dim() < 2:
            continue
        if module not in linear:
            kind = _kind(name, modules.get(module))
            left_out[name] = (tuple(parameter.shape), f"tied {kind}" if owners[id(parameter)] > 1 else kind)
        elif reason := reason_to_leave(module):
            left_out[name] = (tuple(parameter.shape), reason)
        else:
            targets[name] = Target(name, tuple(parameter.shape), isinstance(linear[module], Conv1D))

    selection = TargetSelection(targets, left_out)
    if not targets:
        raise ValueError(_nothing_matched(model, selection, include, exclude))
    _check_fit(selection, pattern, exclude)
    return selection


def clean_name(name: str) -> str:
    """A name without what activation checkpointing under FSDP puts into it, and no file has."""
    return name.replace("_checkpoint_wrapped_module.", "").removesuffix("._checkpoint_wrapped_module")


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a model by the names that targets have."""
    return {clean_name(name): parameter for name, parameter in model.named_parameters()}


def _left_by_default(name: str, stacks: list[str]) -> str | None:
    parts = name.split(".")
    if any(part.startswith("lora_") for part in parts):
        return "adapter"
    if any(part in HEADS for part in parts):
        return "head"
    if _is_router(parts):
        return "router"
    if stacks and not any(name.startswith(stack) for stack in stacks):
        return "outside the layers"
    return None


def _is_router(parts: list[str]) -> bool:
    return "router" in parts or parts[-1] in ROUTERS


def _kind(name: str, module: nn.Module | None) -> str:
    """What a matrix that no linear layer holds is."""
    parts = name.removesuffix(".weight").split(".")
    if isinstance(module, nn.Embedding):
        return "embedding"
    if _is_router(parts):
        return "router"
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return "convolution"
    # All experts of a layer in one tensor of three dimensions. A limit, not a choice: they are most of the model.
    return "fused experts (unsupported)" if "experts" in parts else "not a linear layer"


def _refuse_quantized(model: nn.Module, linear: dict[str, nn.Module]) -> None:
    weights = {name: module.weight for name, module in linear.items()}
    narrow = [name for name, weight in weights.items() if not weight.is_floating_point() or weight.element_size() < 2]
    if narrow or getattr(model, "is_quantized", False) or getattr(model, "quantization_method", None) is not None:
        which = f" (such as {narrow[0]}: {weights[narrow[0]].dtype})" if narrow else ""
        raise ValueError(
            f"{type(model).__name__} is quantized{which}, and pruning needs weights of at least 16 bits. Load it "
            "without a quantization_config, prune it, and quantize the sparse checkpoint afterwards."
        )


def _refuse_frozen_base(model: nn.Module, linear: dict[str, nn.Module]) -> None:
    adapted = hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False)
    frozen = [name for name, module in linear.items() if not module.weight.requires_grad]
    if adapted and frozen:
        raise ValueError(
            f"The base weights of a PEFT/LoRA model are frozen ({len(frozen)} layers of this {type(model).__name__}, "
            f"such as {frozen[0]}), and merging adapters later would destroy the zeros. Merge the adapters first "
            "(`model.merge_and_unload()`) and fine-tune the merged model."
        )


def _check_names(known: Iterable[str], linear: Iterable[str], names: list[str] | str | None, flag: str) -> None:
    """Every name must match some layer: a typo would silently leave a layer dense, or prune it."""
    if isinstance(names, str):
        try:
            re.compile(names)
        except (re.error, OverflowError, RecursionError) as error:  # a{9999999999}, or thousands of brackets
            raise ValueError(f"{flag} is not a regular expression: {names!r} ({error}).") from None
    each = [names] if isinstance(names, str) else [[suffix] for suffix in names or []]
    unmatched = [entry for entry in each if not any(matches(name, entry) for name in known)]
    if unmatched:
        shown = ", ".join(entry if isinstance(entry, str) else entry[0] for entry in unmatched)
        endings = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in linear}))
        raise ValueError(
            f"{flag} matches no layer with: {shown}. Give suffixes of the names of layers, or one regular expression "
            f"that matches whole names ('.*encoder.*' for all within a block). The names of this model's linear "
            f"layers end in: {endings}."
        )


def _nothing_matched(model: nn.Module, selection: TargetSelection, include, exclude) -> str:
    counts = Counter(reason for _, reason in selection.left_out.values())
    reasons = ", ".join(f"{count} {reason}" for reason, count in counts.items()) or "it has no matrices"
    return (
        f"No layer of {type(model).__name__} matched, so nothing would be pruned (sparsity_include={include!r}, "
        f"sparsity_exclude={exclude!r}; left out: {reasons}). Name the modules to prune with "
        "sparsity_include, unfreeze them, or set sparsity_pattern='none'."
    )


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
            # Beside what is excluded already: the flag given again replaces its value.
            if isinstance(exclude, str):
                names = f"'{'|'.join([f'({exclude})', *map(re.escape, misfits)])}'"
            else:
                names = " ".join([*(exclude or []), *misfits])
            advice = f"Leave them dense with --sparsity_exclude {names}, or choose a pattern that divides them."
        raise ValueError(
            f"Pattern {pattern} does not fit {len(misfits)} of {len(selection.targets)} layers:\n{listing}\n{advice}"
        )

"""What is a layer and what is a head, told from the module tree alone.

A layer, or block, hands a hidden state on: another layer reads what it puts out. A head does not: what it puts out are
labels, tokens, boxes. So blocks are what stands in a list of modules (`nn.ModuleList`, or a sequence or dict that
repeats a class), unless it is a bare linear layer, or puts out a width that nothing in the list reads. All that is in
no block is left dense, and so are some modules by their names.

A model without blocks counts as one layer, less what stands at its end and puts out a width that no other layer reads.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterator

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_admm.sparsity.matrices import clean_name, is_linear, is_router


# Modules that map the last hidden state to a task or to a vocabulary: small, sensitive, and new in most fine-tuning
# runs. Heads wherever they are.
HEADS = ("classifier", "pooler", "qa_outputs", "score", "lm_head")
# Heads too, where they are not within a block: there "heads" are those of the attention.
_HEAD_NAMES = re.compile(r"(?!multi)(\w+_)?(heads?|classifiers?|predictors?)|(class|bbox|box|mask)_embed")
# A block with attention is one whatever its last linear layer is: some end with a gate or a bias.
_ATTENTION = re.compile(r"att(entio)?n|query|qkv|q_proj|mixer", re.IGNORECASE)
# Layers that steer a block from aside, which says nothing of what it puts out.
_ASIDE = re.compile(r"ada|modulation|gate|scale|shift|cond", re.IGNORECASE)


def reasons_by_default(model: nn.Module) -> dict[str, str]:
    """
    Why linear layers stay dense unless they are named.

    Args:
        model (`nn.Module`):
            The model.

    Returns:
        `dict[str, str]`: The reason (`"adapter"`, `"head"`, `"router"`, `"outside the layers"`), by the module's name.
    """
    named = {clean_name(name): module for name, module in model.named_modules(remove_duplicate=False)}
    linear = {name: module for name, module in named.items() if is_linear(module)}
    reasons = {name: reason for name in linear if (reason := _reason_by_name(name.split(".")))}
    blocks, heads = [], []
    _find_blocks(model, "", blocks, heads)
    if blocks or any(_has_other_blocks(module) for module in model.modules()):
        for name in linear:
            if name not in reasons and not name.startswith(tuple(blocks)):
                reasons[name] = "head" if f"{name}.".startswith(tuple(heads)) else "outside the layers"
    else:
        alone = sum(parameter.dim() > 1 for parameter in model.parameters()) == 1
        last = [] if alone else _last_layers(linear, known=reasons)
        reasons |= dict.fromkeys(last, "head")
    return reasons


def _reason_by_name(parts: list[str]) -> str | None:
    if any(part.startswith("lora_") for part in parts):
        return "adapter"
    if any(part in HEADS for part in parts):
        return "head"
    return "router" if is_router(parts) else None


def _find_blocks(module: nn.Module, prefix: str, blocks: list[str], heads: list[str]) -> None:
    """Adds the prefixes of the names within blocks, and within what is known for a head."""
    elements = _elements(module)
    read = {width for element in elements.values() for width, _ in _widths(element)}
    within_head = bool(heads) and prefix.startswith(tuple(heads))
    for name, child in module.named_children():
        inside = clean_name(f"{prefix}{name}.")
        attends = name in elements and _attends(child)
        if attends or (name in elements and not within_head and not _puts_out(child).isdisjoint(read)):
            blocks.append(inside)
            continue
        bare = isinstance(module, nn.ModuleList) and is_linear(child)
        if bare or name in elements or name in HEADS or _HEAD_NAMES.fullmatch(name):
            heads.append(inside)
        _find_blocks(child, inside, blocks, heads)


def _elements(module: nn.Module) -> dict[str, nn.Module]:
    """What may be blocks among the elements of a list, sequence or dict of modules."""
    if not isinstance(module, nn.ModuleList | nn.Sequential | nn.ModuleDict):
        return {}
    children = {name: child for name, child in module.named_children() if not is_linear(child)}
    whole = [name for name, child in children.items() if any(isinstance(m, PreTrainedModel) for m in child.modules())]
    counts = {name: sum(1 for _ in _widths(child)) for name, child in children.items() if name not in whole}
    if isinstance(module, nn.ModuleList):
        return {name: children[name] for name, count in counts.items() if count}
    if whole:
        return {}  # models and what follows them, as in Sentence Transformers
    # One linear layer and its activation make a step of an MLP, not a block.
    found = {name: children[name] for name, count in counts.items() if count > 1}
    classes = Counter(type(child) for child in found.values())
    alone = isinstance(module, nn.Sequential) and len(module) == 1
    return {name: child for name, child in found.items() if alone or classes[type(child)] > 1}


def _has_other_blocks(module: nn.Module) -> bool:
    """Whether a module lists blocks without a linear layer, such as convolutions: what is beside them is no layer."""
    if not isinstance(module, nn.ModuleList):
        return False
    others = [child for child in module if next(child.children(), None) is not None and not any(_widths(child))]
    return any(parameter.dim() > 1 for child in others for parameter in child.parameters())


def _attends(element: nn.Module) -> bool:
    return any(_ATTENTION.search(part) for name, _ in element.named_modules() for part in name.split("."))


def _puts_out(element: nn.Module) -> set[int]:
    """The width of what an element puts out: that of its last linear layer."""
    widths = [out for _, out in _widths(element, _ASIDE)] or [out for _, out in _widths(element)]
    return set(widths[-1:])


def _widths(module: nn.Module, aside: re.Pattern | None = None) -> Iterator[tuple[int, int]]:
    """Inputs and outputs of the linear layers within a module, in their order, without routers and adapters."""
    for name, layer in module.named_modules():
        if not is_linear(layer) or _reason_by_name(name.split(".")) in ("router", "adapter"):
            continue
        if aside is None or not aside.search(name):
            yield _width(layer)


def _width(layer: nn.Module) -> tuple[int, int]:
    if isinstance(layer, nn.MultiheadAttention):
        return layer.embed_dim, layer.embed_dim
    if isinstance(layer, Conv1D):
        return layer.nx, layer.nf
    return layer.in_features, layer.out_features


def _last_layers(linear: dict[str, nn.Module], known: Collection[str]) -> list[str]:
    """The layers at the end of a model without blocks that put out what no other layer reads, and heads by name."""
    widths = {name: _width(module) for name, module in linear.items()}
    named = [name for name in linear if name not in known and _named_head(name)]
    last = []
    for name in reversed([name for name in linear if name not in known and name not in named]):
        if any(read == widths[name][1] for other, (read, _) in widths.items() if other != name):
            break
        last.append(name)
    return named + last


def _named_head(name: str) -> bool:
    """`head`, `model.head` and `heads.0`, though not the key of a head of attention."""
    words = [part for part in name.split(".") if not part.isdigit()]
    return bool(words) and any(_HEAD_NAMES.fullmatch(word) for word in (words[0], words[-1]))

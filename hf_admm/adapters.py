"""LoRA and other adapters on a base that is sparse: merged under the base's mask, with a word on what that costs.

An adapter's update is dense, so that a plain merge leaves hardly a zero. Here it is cut off wherever the base is zero,
which at 50 % sparsity takes about 70 % of its norm. How much in each weight is measured and said.
"""

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_admm.console import get_logger, say
from hf_admm.pruning.updates import squared_norm, squared_outside
from hf_admm.sparsity.chunks import tensor_work
from hf_admm.sparsity.matrices import adapter_prefixes, named_parameters
from hf_admm.sparsity.own import SPARSE_FROM, count_zeros, is_sparse
from hf_admm.sparsity.projections import zero_outside


logger = get_logger(__name__)

# More than this share of the update's norm is worth a warning: the merged model is not the one that was evaluated.
_SMALL_CUT = 0.1
# What PEFT puts into the name of a weight that it wraps.
_WRAPPED = re.compile(r"\.(base_layer|original_module|token_adapter)(?=\.)")
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class MergedWeight:
    """
    What became of one sparse weight.

    Args:
        name (`str`):
            Its parameter name in the merged model.
        density (`float`):
            Share of its entries that are not zero.
        weight_norm (`float`), update_norm (`float`), cut_norm (`float`):
            Of the base's weight, of the adapters' update to it, and of the part of the update outside of the mask.
    """

    name: str
    density: float
    weight_norm: float
    update_norm: float
    cut_norm: float

    @property
    def cut(self) -> float:
        """The share of the update's norm that the mask cut off."""
        return self.cut_norm / self.update_norm if self.update_norm else 0.0


@dataclass(frozen=True)
class MergeReport:
    """
    What the mask of a sparse base cost in a merge.

    Args:
        weights (`list[MergedWeight]`):
            The sparse weights that had an adapter or a trained copy.
    """

    weights: list[MergedWeight]

    @property
    def cut(self) -> float:
        """The share of the norm of all updates together that the mask cut off."""
        return _total(weight.cut_norm for weight in self.weights) / (
            _total(weight.update_norm for weight in self.weights) or 1.0
        )

    def table(self) -> str:
        """A plain-text table with a row for each weight and a last line that sums up."""
        rows = [("weight", "zeros", "update / weight", "cut off")]
        for weight in self.weights:
            relative = weight.update_norm / weight.weight_norm if weight.weight_norm else 0.0
            rows.append((weight.name, f"{1 - weight.density:.1%}", f"{relative:.2%}", f"{weight.cut:.1%}"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
        return "\n".join([*lines, self.summary()])

    def summary(self) -> str:
        """One line."""
        if not self.weights:
            return "merged: no sparse weight had an adapter, so that the mask cut nothing off"
        cuts = [weight.cut for weight in self.weights]
        return (
            f"merged under the mask of {len(cuts)} sparse weights, which keep every zero; the mask cut off "
            f"{self.cut:.1%} of the norm of the update ({min(cuts):.1%} to {max(cuts):.1%} by weight)"
        )


def merge_sparse_adapter(
    model: nn.Module, adapter_names: list[str] | None = None, output_report: bool = False
) -> nn.Module | tuple[nn.Module, MergeReport]:
    """
    Merges the adapters of a PEFT model into its sparse base, whose zeros all stay zero.

    The merge is PEFT's own (`merge_and_unload`), whatever the kind of adapter, and what it writes into zeros of the
    base is taken out again, also of modules that were trained whole (`modules_to_save`). Embeddings have no mask.
    Meanwhile the sparse weights that have an adapter are in memory twice.

    Args:
        model (`peft.PeftModel`):
            A sparse model with adapters, not merged yet. It can't be used afterwards.
        adapter_names (`list[str]`, *optional*):
            The adapters to merge. By default those that are active.
        output_report (`bool`, *optional*, defaults to `False`):
            Whether to return what the mask cost too.

    Returns:
        `nn.Module`: The base with the adapters merged, to be saved or fine-tuned on; its weights are frozen, as PEFT
            leaves them. With `output_report` a tuple of it and a [`MergeReport`].

    Raises:
        `ValueError`: If there is nothing to merge or to keep, or the base can't be merged into; the message says why
            and what to do. The model is then as it was, but where PEFT failed halfway, which is said.

    Example:

    ```python
    from hf_admm import merge_sparse_adapter
    from peft import PeftModel

    model = merge_sparse_adapter(PeftModel.from_pretrained(sparse_base, "adapter"))
    model.save_pretrained("merged")
    ```
    """
    names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
    _check(model, names)
    before, embeddings = _sparse_weights(model), _embedding_zeros(model)
    try:
        merged = model.merge_and_unload(safe_merge=True, adapter_names=names)
    except Exception as error:  # whatever a kind of adapter raises that can't be merged
        raise ValueError(
            f"PEFT can't merge these adapters ({type(error).__name__}: {error}). Some layers may be merged by now: "
            "load base and adapter again before anything else is done with them."
        ) from error
    report = MergeReport(_cut(merged, before))
    logger.info(report.table())
    say(f"hf_admm: {report.summary()}")
    if report.cut > _SMALL_CUT:
        worst = ", ".join(f"{w.name} ({w.cut:.1%})" for w in sorted(report.weights, key=lambda w: -w.cut)[:3])
        logger.warning(
            f"The mask cut off {report.cut:.1%} of the norm of the update, most in {worst}: the merged model is not "
            "the one that was evaluated with its adapters. Evaluate it again, and fine-tune it for some steps with "
            "sparsity_pattern='own' (after requires_grad_(True)) if it has lost accuracy."
        )
    live = named_parameters(merged)
    filled = {name: zeros - count_zeros(live[name]) for name, zeros in embeddings.items() if name in live}
    if filled := {name: lost for name, lost in filled.items() if lost > 0}:
        logger.warning(
            "Embeddings have no mask, and these have lost zeros: "
            f"{', '.join(f'{name} ({lost:,})' for name, lost in filled.items())}."
        )
    return (merged, report) if output_report else merged


def _check(model: nn.Module, names: list[str] | None) -> None:
    if not (hasattr(model, "peft_config") and hasattr(model, "get_base_model")):
        held = " It has adapters within: save them (save_pretrained) and" if _has_adapters(model) else " Load them and"
        raise ValueError(
            f"{type(model).__name__} is not a model that PEFT has put adapters on, so there is nothing to merge."
            f"{held} wrap the sparse base with peft.PeftModel.from_pretrained(base, folder)."
        )
    configs = model.peft_config
    if unknown := [name for name in names or () if name not in configs]:
        raise ValueError(f"adapter_names has {', '.join(unknown)}, and the model has {', '.join(configs)}.")
    active = names if names is not None else _active(model)
    if not active:
        raise ValueError(f"No adapter is active. Name those to merge with adapter_names: {', '.join(configs)}.")
    faults = []
    if prompts := [name for name in active if configs[name].is_prompt_learning]:
        kinds = ", ".join(f"{name} ({_kind(configs[name])})" for name in prompts)
        faults.append(f"{kinds} learn prompts, which no weight can take in: keep them beside the base")
    elif not hasattr(model, "merge_and_unload"):
        kinds = ", ".join(f"{name} ({_kind(configs[name])})" for name in active)
        faults.append(f"PEFT can't merge {kinds} into weights: keep them beside the base")
    if done := [name for name, module in model.named_modules() if getattr(module, "merged_adapters", None)]:
        faults.append(
            f"{len(done)} layers have merged their adapters already, such as {done[0]}, and with that the base has "
            "lost its zeros: load base and adapter again (unmerge_adapter() brings the zeros back to rounding only)"
        )
    base = _base(model)
    narrow = [n for n, w in base.items() if not w.is_floating_point() or w.element_size() < 2]
    if narrow or getattr(model.get_base_model(), "is_quantized", False):
        faults.append(
            f"the base is quantized{f' (such as {narrow[0]})' if narrow else ''}: load it in bfloat16 or float32"
        )
    if meta := [name for name, weight in model.named_parameters() if weight.is_meta]:
        faults.append(f"{len(meta)} weights are not in memory, such as {meta[0]}: load the model without offloading")
    elif broken := [n for n, w in model.named_parameters() if n not in base and not w.isfinite().all()]:
        faults.append(f"{len(broken)} weights hold NaN or infinities, such as {broken[0]}: take an earlier checkpoint")
    elif not _pruned(model):
        faults.append(
            f"no weight of the base is sparse (at least {SPARSE_FROM:.0%} of zeros), so there is no mask to keep: "
            "load the sparse base, or call model.merge_and_unload() if it is meant to be dense"
        )
    if faults:
        raise ValueError(f"These adapters can't be merged into a sparse base: {'; '.join(faults)}.")


def _sparse_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the sparse weights that are about to change, by the names that they will have."""
    return {_final_name(n): w.detach().clone() for n, w in _pruned(model).items() if _WRAPPED.search(n)}


def _embedding_zeros(model: nn.Module) -> dict[str, int]:
    held = _embeddings(model)
    wrapped = {n: w for n, w in _base(model).items() if id(w) in held and _WRAPPED.search(n)}
    return {_final_name(name): count_zeros(w) for name, w in wrapped.items() if count_zeros(w, empty_rows=False)}


def _embeddings(model: nn.Module) -> set[int]:
    return {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}


@tensor_work
def _cut(merged: nn.Module, before: dict[str, torch.Tensor]) -> list[MergedWeight]:
    """Takes out of the merged weights what lies outside of the masks, and measures it."""
    live, found = named_parameters(merged), []
    for name in list(before):
        base, weight = before.pop(name), live[name].detach()
        mask = base != 0
        update = weight.float() - base.float()
        norms = [squared_norm(base.float()), squared_norm(update), squared_outside(update, mask)]
        zero_outside(weight, mask)
        found.append(MergedWeight(name, mask.float().mean().item(), *(norm.item() ** 0.5 for norm in norms)))
    return found


def _base(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of the base, without adapters and trained copies, by the names that they have under PEFT."""
    beside = adapter_prefixes(model)
    return {n: w for n, w in model.named_parameters() if not n.startswith(beside) and ".modules_to_save." not in n}


def _pruned(model: nn.Module) -> dict[str, nn.Parameter]:
    """The sparse weights of the base, as sparsity_pattern='own' tells them."""
    held = _embeddings(model)
    matrices = {n: w for n, w in _base(model).items() if w.dim() > 1 and id(w) not in held}
    return {n: w for n, w in matrices.items() if is_sparse(count_zeros(w), w.numel())}


def _final_name(name: str) -> str:
    return _WRAPPED.sub("", name.removeprefix(_PREFIX))


def _active(model: Any) -> list[str]:
    active = getattr(model, "active_adapters", None) or getattr(model, "active_adapter", None) or []
    return [active] if isinstance(active, str) else list(active)


def _kind(config: Any) -> str:
    return str(getattr(config.peft_type, "value", config.peft_type))


def _has_adapters(model: nn.Module) -> bool:
    return any(hasattr(m, "peft_config") or getattr(m, "_hf_peft_config_loaded", False) for m in model.modules())


def _total(norms) -> float:
    return sum(norm**2 for norm in norms) ** 0.5

"""Models that can't be pruned, and what to do about it."""

from collections import Counter
from collections.abc import Mapping

from torch import nn

from hf_admm.sparsity.matrices import FROZEN, Matrix, is_linear, named_modules


# Reasons that `sparsity_include` overrules.
_NAMEABLE = ("head", "router", "outside the layers", "adapter", "not in sparsity_include")


def refuse_quantized(model: nn.Module) -> None:
    """Weights of fewer than 16 bits can't be pruned."""
    weights = {}
    for name, module in named_modules(model).items():
        if is_linear(module):
            # Not by `module.weight`, which for a parametrized layer is computed.
            held = {**module._buffers, **module._parameters}
            if (weight := held.get("weight", held.get("weight_orig"))) is not None:
                weights[name] = weight
    narrow = [name for name, weight in weights.items() if not weight.is_floating_point() or weight.element_size() < 2]
    if narrow or getattr(model, "is_quantized", False) or getattr(model, "quantization_method", None) is not None:
        which = f" (such as {narrow[0]}: {weights[narrow[0]].dtype})" if narrow else ""
        raise ValueError(
            f"{type(model).__name__} is quantized{which}, and pruning needs weights of at least 16 bits. Load it "
            "without a quantization_config, prune it, and quantize the sparse checkpoint afterwards."
        )


def refuse_frozen_base(model: nn.Module, known: Mapping[str, Matrix]) -> None:
    """Adapters, in the model or in one of its parts, over weights that are frozen or trained with them."""
    if not any(_has_adapters(module) for module in model.modules()):
        return
    frozen = [m.module for m in known.values() if m.linear and not m.fault and not m.parameter.requires_grad]
    kind = type(model).__name__
    if frozen:
        fault = (
            f"The base weights of a PEFT/LoRA model are frozen ({len(frozen)} layers of this {kind}, such as "
            f"{frozen[0]}), and merging adapters later would destroy the zeros."
        )
    elif any("base_layer" in module._modules for module in model.modules()):  # not merged yet
        fault = (
            f"The base weights of this PEFT/LoRA model ({kind}) are trained, but its checkpoints hold the adapters "
            "alone, and merging them later would destroy the zeros."
        )
    else:
        return
    raise ValueError(
        f"{fault} Merge the adapters first: `model = model.merge_and_unload()`, then `model.requires_grad_(True)`, "
        "since merged weights stay frozen; and fine-tune the merged model. If the adapters were loaded into the model "
        "itself (`add_adapter`, `load_adapter`, Sentence Transformers), save them and load them with "
        "`peft.PeftModel.from_pretrained(base, folder)`, which can be merged. If the base is sparse already, "
        "train its adapters with sparsity_pattern='own' and merge them with hf_admm.merge_sparse_adapter, which keeps "
        "its zeros."
    )


def refuse_adapter_config(trainer: str, config: object) -> None:
    """A `peft_config`, by which a trainer freezes the weights that it is to prune."""
    if config is not None:
        raise ValueError(
            f"{trainer} got a peft_config ({type(config).__name__}): it freezes the weights that are to be pruned, "
            "and checkpoints would hold the adapter alone. Leave peft_config away, so that all weights are trained. "
            "If the model is sparse already, train the adapter with sparsity_pattern='own' and merge it with "
            "hf_admm.merge_sparse_adapter, which keeps the zeros."
        )


def _has_adapters(module: nn.Module) -> bool:
    return hasattr(module, "peft_config") or getattr(module, "_hf_peft_config_loaded", False)


def nothing_matched(
    model: nn.Module, left_out: Mapping[str, tuple[tuple[int, ...], str]], include: object, exclude: object
) -> str:
    """What to say where nothing would be pruned: why, and what would change it."""
    counts = Counter(reason for _, reason in left_out.values())
    reasons = ", ".join(f"{count} {reason}" for reason, count in counts.items()) or "it has no matrices"
    advice = []
    if nameable := [name.removesuffix(".weight") for name, (_, reason) in left_out.items() if reason in _NAMEABLE]:
        shown = ", ".join(nameable[:5]) + (", ..." if len(nameable) > 5 else "")
        advice.append(f"Of these, sparsity_include can name: {shown}.")
    if counts["excluded by sparsity_exclude"]:
        advice.append("Exclude less with sparsity_exclude.")
    if counts[FROZEN]:
        advice.append("Unfreeze weights with model.requires_grad_(True).")
    if counts["parametrized"]:
        advice.append("Remove the parametrizations (torch.nn.utils.parametrize.remove_parametrizations).")
    return (
        f"No layer of {type(model).__name__} matched, so nothing would be pruned (sparsity_include={include!r}, "
        f"sparsity_exclude={exclude!r}; left out: {reasons}). Only linear layers and nn.MultiheadAttention can be "
        f"pruned. {' '.join([*advice, ''])}Set sparsity_pattern='none' to train without pruning."
    )

"""The matrices of a model: which module holds each, how it may be named, and what can't be pruned whoever asks."""

from collections import Counter
from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D


# Routers of a mixture of experts: a few outputs that decide where every token goes.
ROUTERS = ("router", "gate", "router_gate", "shared_expert_gate")
FROZEN = "frozen"  # why a weight is left that would be pruned, were it trained
TIED = "tied to another module"
CONVOLUTION = "convolution"
EMBEDDING = "embedding"
ROUTER = "router"
FUSED_EXPERTS = "fused experts (unsupported)"
# Queries, keys and values of `nn.MultiheadAttention`: one parameter, or three if their widths differ.
_ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
_PARAMETRIZATIONS = "parametrizations"


@dataclass(frozen=True)
class Matrix:
    """
    A parameter of two or more dimensions, and where it stands.

    Args:
        name (`str`):
            Its parameter name.
        parameter (`nn.Parameter`):
            The parameter.
        module (`str`):
            Name of the module that computes with it.
        owner (`nn.Module`):
            That module.
        names (`tuple[str, ...]`):
            What it is called by a user: its module, the parameter itself, and for the output projection of an
            `nn.MultiheadAttention` the attention too.
        linear (`bool`):
            Whether its module is a linear layer or an attention, which a user may want pruned.
        fault (`str`, *optional*):
            Why it can't be pruned in any case.
        tied_to (`str`, *optional*):
            Another name of the same parameter.
    """

    name: str
    parameter: nn.Parameter
    module: str
    owner: nn.Module
    names: tuple[str, ...]
    linear: bool
    fault: str | None = None
    tied_to: str | None = None

    @property
    def transposed(self) -> bool:
        """Whether it is stored as `(in_features, out_features)`."""
        return isinstance(self.owner, Conv1D)

    @property
    def reason(self) -> str | None:
        """Why it stays dense even if it is named, `None` if it can be pruned."""
        if self.fault:
            return f"tied {self.fault}" if self.tied_to else self.fault
        if self.tied_to:
            return TIED
        return None if self.parameter.requires_grad else FROZEN


def clean_name(name: str) -> str:
    """A name without what activation checkpointing under FSDP puts into it, and no file has."""
    return name.replace("_checkpoint_wrapped_module.", "").removesuffix("._checkpoint_wrapped_module")


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a model by the names that targets have."""
    return {clean_name(name): parameter for name, parameter in model.named_parameters()}


def named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model by the names that targets have, those that stand in two places by both."""
    return {clean_name(name): module for name, module in model.named_modules(remove_duplicate=False)}


def matrices(model: nn.Module) -> dict[str, Matrix]:
    """
    Every matrix of a model, by parameter name; a tied one by each of its names.

    Args:
        model (`nn.Module`):
            The model. No weight is computed: to read one that is parametrized may change it.

    Returns:
        `dict[str, Matrix]`: The matrices in the order of the model.
    """
    modules = named_modules(model)
    parameters = [(clean_name(name), value) for name, value in model.named_parameters(remove_duplicate=False)]
    owners = Counter(id(parameter) for _, parameter in parameters)
    found = {}
    for name, parameter in parameters:
        if parameter.dim() < 2:
            continue
        module, attribute = _owner(name)
        others = (other for other, value in parameters if value is parameter and other != name)
        tied_to = next(others) if owners[id(parameter)] > 1 else None
        owner, parent = modules[module], modules.get(module.rpartition(".")[0])
        names = (module, name)
        if isinstance(parent, nn.MultiheadAttention):
            names += (module.rpartition(".")[0],)
        linear, fault = _judge(name, owner, attribute)
        found[name] = Matrix(name, parameter, module, owner, names, linear, fault, tied_to)
    return found


def is_linear(module: nn.Module) -> bool:
    """Whether a module is of a kind whose weights are pruned."""
    return isinstance(module, nn.Linear | Conv1D | nn.MultiheadAttention)


def is_router(parts: list[str]) -> bool:
    """Whether a module name, taken apart, is that of a router."""
    return "router" in parts or parts[-1] in ROUTERS or parts[-1].endswith("_router")


def adapter_prefixes(model: nn.Module) -> tuple[str, ...]:
    """Prefixes of the parameters that PEFT has put beside a layer, which it holds as `base_layer`."""
    prefixes = []
    for name, module in named_modules(model).items():
        if "base_layer" in module._modules:
            beside = [part for part in (*module._modules, *module._parameters) if part != "base_layer"]
            prefixes += [f"{name}.{part}".lstrip(".") for part in beside]
    return tuple(prefixes)


def _owner(name: str) -> tuple[str, str]:
    """The module that computes with a parameter, and the parameter's name there."""
    parts = name.split(".")
    end = parts.index(_PARAMETRIZATIONS) if _PARAMETRIZATIONS in parts else len(parts) - 1
    return ".".join(parts[:end]), ".".join(parts[end:])


def _judge(name: str, owner: nn.Module, attribute: str) -> tuple[bool, str | None]:
    """Whether a matrix is the weight of a linear layer, and why it can't be pruned."""
    if is_linear(owner):
        weights = _ATTENTION_WEIGHTS if isinstance(owner, nn.MultiheadAttention) else ("weight",)
        if attribute in weights:
            return True, None
        # Its weight is no parameter but computed in every forward pass: from `weight_orig`, `weight_v` and the like.
        held = [weight for weight in weights if owner._parameters.get(weight) is not None]
        if not held or attribute.startswith(_PARAMETRIZATIONS):
            return True, "parametrized"
        return False, "not a linear layer"
    parts = name.removesuffix(".weight").split(".")
    if isinstance(owner, nn.Embedding):
        return False, EMBEDDING
    if is_router(parts):
        return False, ROUTER
    if isinstance(owner, nn.modules.conv._ConvNd):
        return False, CONVOLUTION
    # All experts of a layer in one tensor of three dimensions. A limit, not a choice: they are most of the model.
    return False, FUSED_EXPERTS if "experts" in parts else "not a linear layer"


def how_to_fold(matrix: Matrix) -> str:
    """What makes a plain weight of a parametrized one."""
    attribute = matrix.name.removeprefix(f"{matrix.module}.")
    if attribute.startswith(_PARAMETRIZATIONS):
        weight = attribute.split(".")[1]
        return f"torch.nn.utils.parametrize.remove_parametrizations(module, '{weight}')"
    weight, _, suffix = attribute.rpartition("_")
    if suffix in ("g", "v"):
        return f"torch.nn.utils.remove_weight_norm(module, '{weight}')"
    if f"{weight}_mask" in matrix.owner._buffers:
        return f"torch.nn.utils.prune.remove(module, '{weight}')"
    return f"torch.nn.utils.remove_spectral_norm(module, '{weight}')"

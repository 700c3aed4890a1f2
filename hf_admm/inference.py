"""Serving: the linear layers of a 2:4 model as PyTorch's semi-structured sparse tensors, on CUDA.

A layer is converted only if its weight is 2:4 to the last group, and kept so only if the kernel that serves it gives
back every value of the weight (the identity matrix goes through it). So all that can differ between the outputs of the
dense and the converted model is the rounding of sums. The other layers stay as they are, each with its reason.
"""

from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from hf_admm.sparsity.patterns import parse_pattern
from hf_admm.sparsity.projections import broken_groups


# In the order of preference, which is PyTorch's own.
BACKENDS = {
    "cusparselt": torch.sparse.SparseSemiStructuredTensorCUSPARSELT,
    "cutlass": torch.sparse.SparseSemiStructuredTensorCUTLASS,
}
# PyTorch's kernels for float32 take one of every two entries, which a 2:4 weight breaks: they would drop values.
DTYPES = (torch.float16, torch.bfloat16)

# How many columns of a matrix are asked for at once when it is made dense.
_PROBES = 1024
_PATTERN = parse_pattern("2:4")


@dataclass(frozen=True)
class LayerDecision:
    """
    What [`accelerate_inference`] decided on one linear layer.

    Args:
        name (`str`):
            Name of its weight, as in `model.named_parameters()`.
        shape (`tuple[int, ...]`):
            `(out_features, in_features)`, whichever way round it is stored.
        backend (`str`, *optional*):
            `"cusparselt"` or `"cutlass"`, whose kernels serve it. `None` if it stays dense.
        reason (`str`, *optional*, defaults to `""`):
            Why it stays dense.
    """

    name: str
    shape: tuple[int, ...]
    backend: str | None
    reason: str = ""


@dataclass(frozen=True)
class InferenceReport:
    """
    What [`accelerate_inference`] did.

    Args:
        layers (`list[LayerDecision]`):
            One entry for each linear layer, in the order of the model.
        dry_run (`bool`, *optional*, defaults to `False`):
            Whether the model was left as it is.
    """

    layers: list[LayerDecision]
    dry_run: bool = False

    @property
    def converted(self) -> list[LayerDecision]:
        """The layers that are sparse now, or would be after a dry run."""
        return [layer for layer in self.layers if layer.backend]

    def table(self) -> str:
        """A plain-text table: weight, shape, the backend or why it stays dense, and a summary line."""
        rows = [("weight", "shape", "sparse or why not")]
        for layer in self.layers:
            outcome = f"sparse ({layer.backend})" if layer.backend else f"dense: {layer.reason}"
            rows.append((layer.name, "x".join(map(str, layer.shape)), outcome))
        widths = [max(len(row[column]) for row in rows) for column in range(2)]
        lines = [f"{name:<{widths[0]}}  {shape:>{widths[1]}}  {outcome}" for name, shape, outcome in rows]
        return "\n".join([*lines, self.summary()])

    def summary(self) -> str:
        """One line: how many layers are sparse, and how many are not, by reason."""
        reasons = Counter(layer.reason.partition(" (")[0] for layer in self.layers if not layer.backend)
        dense = ", ".join(f"{count} {reason}" for reason, count in reasons.items()) or "none"
        verb = "would be sparse" if self.dry_run else "sparse"
        return f"{len(self.converted)} of {len(self.layers)} linear layers {verb}; left dense: {dense}"


class _Sparse:
    """A linear layer with a sparse `(out_features, in_features)` weight, and the state dict of the dense layer."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        # PyTorch's sparse tensors take neither every stride nor every number of dimensions.
        rows = input.reshape(-1, input.shape[-1]).contiguous()
        outputs = functional.linear(rows, self.weight, self.bias)
        return outputs.reshape(*input.shape[:-1], self.weight.shape[0])

    def dense_weight(self) -> torch.Tensor:
        dense = _dense(self.weight)
        return dense.t().contiguous() if isinstance(self, Conv1D) else dense

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.dense_weight()

    def _apply(self, fn, recurse=True):
        said = "A sparse weight can't be cast or moved to another GPU, and other weights may have been ({}). Load the "
        said += "checkpoint again, and accelerate it once it is in its place and dtype."
        if hasattr(self.weight, "BACKEND"):  # asked before: PyTorch 2.6 ends the process in the midst of a cast
            was = self.weight.dtype
            becomes = fn(torch.empty(0, dtype=was, device=self.weight.device)).dtype
            if becomes != was:
                raise ValueError(said.format(f"{was} to {becomes}"))
        try:
            return super()._apply(fn, recurse)
        except NotImplementedError as error:
            raise ValueError(said.format(error)) from error


class SparseLinear(_Sparse, nn.Linear):
    """What [`accelerate_inference`] makes of an `nn.Linear`."""


class SparseConv1D(_Sparse, Conv1D):
    """What [`accelerate_inference`] makes of GPT-2's `Conv1D`: its weight is `(out_features, in_features)` for now."""


_SPARSE_CLASSES = {nn.Linear: SparseLinear, Conv1D: SparseConv1D}


def accelerate_inference(model: nn.Module, backend: str | None = None, dry_run: bool = False) -> InferenceReport:
    """
    Turns the 2:4 linear layers of a model into PyTorch's semi-structured sparse tensors, in place, for inference.

    Call it on a model in `eval()` mode, on its GPU and in its final dtype, before `torch.compile`. The converted
    weights are frozen. `state_dict` and `save_pretrained` still give the plain dense checkpoint, and [`restore_dense`]
    the dense layers: the same values, though a negative zero may come back as a positive one.

    Args:
        model (`nn.Module`):
            The model.
        backend (`str`, *optional*):
            `"cusparselt"` or `"cutlass"`. Defaults to the first of them that is there and serves the layer.
        dry_run (`bool`, *optional*, defaults to `False`):
            Whether to leave the model as it is and only say what would be converted. On a CPU a GPU with both backends
            is assumed.

    Returns:
        [`InferenceReport`]: Which layers were converted, and why the others stay dense.

    Raises:
        `ValueError`: If the backend is unknown or missing, if no weight is on a CUDA GPU, or if no layer can be
            converted. The model is as it was then.
    """
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    devices = {module.weight.device for module in linear.values()}
    on_gpu = any(map(_is_cuda, devices))
    backends = _available(backend, assume_all=dry_run and not on_gpu)
    if linear and not on_gpu and not dry_run:
        raise ValueError(
            "accelerate_inference needs a CUDA GPU of compute capability 8.0 (Ampere) or newer, and this "
            f"{type(model).__name__} is on {', '.join(sorted(map(str, devices)))} (torch.cuda.is_available(): "
            f"{torch.cuda.is_available()}). Call model.to('cuda'), or see with dry_run=True what would be converted."
        )
    owners = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    decisions = []
    try:
        for name, module in linear.items():
            shape = _matrix_shape(module)
            chosen, reason = _decide(module, backends, owners[id(module.weight)] > 1, on_gpu)
            if chosen and not dry_run and not isinstance(module, _Sparse):
                chosen, reason = _convert(module, chosen)
            decisions.append(LayerDecision(f"{name}.weight".lstrip("."), shape, next(iter(chosen), None), reason))
    except BaseException:  # half a conversion is of no use
        restore_dense(model)
        raise
    report = InferenceReport(decisions, dry_run)
    if not report.converted and not dry_run:
        raise ValueError(
            f"Nothing of this {type(model).__name__} can be accelerated: {report.summary()}. For each layer, "
            "accelerate_inference(model, dry_run=True).table() says why."
        )
    return report


def restore_dense(model: nn.Module) -> None:
    """
    Undoes [`accelerate_inference`]: every converted layer becomes the dense one that it was.

    Args:
        model (`nn.Module`):
            The model, changed in place.
    """
    for module in model.modules():
        if isinstance(module, _Sparse):
            module.weight = nn.Parameter(module.dense_weight(), requires_grad=module.dense_requires_grad)
            module.__class__ = Conv1D if isinstance(module, Conv1D) else nn.Linear
            del module.dense_requires_grad


def _available(backend: str | None, assume_all: bool) -> list[str]:
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"Unknown backend {backend!r}: give {' or '.join(map(repr, BACKENDS))}, or None for any.")
    # Where torch can't tell whether it is there, a conversion does.
    cusparselt = getattr(torch.backends, "cusparselt", None)
    present = assume_all or cusparselt is None or cusparselt.is_available()
    if backend == "cusparselt" and not present:
        raise ValueError(f"This PyTorch ({torch.__version__}) comes without cuSPARSELt: give 'cutlass' or None.")
    return [backend] if backend else list(BACKENDS) if present else ["cutlass"]


def _is_cuda(device: torch.device) -> bool:
    return device.type == "cuda"


def _decide(module: nn.Module, backends: list[str], shared: bool, on_gpu: bool) -> tuple[list[str], str]:
    """The backends that a layer may have, in order; if there are none, why."""
    weight, bias = module.weight, module.bias
    if isinstance(module, _Sparse):
        name = getattr(weight, "BACKEND", None)  # PyTorch makes it dense when the model moves to a CPU
        return ([name], "") if name else ([], "moved since it was converted: call restore_dense(model)")
    if type(module) not in _SPARSE_CLASSES:
        return [], f"a {type(module).__name__}, which computes in its own way"
    if "forward" in vars(module):  # a hook of accelerate calls the forward of the dense class
        return [], "its forward is wrapped"
    if type(weight.data) is not torch.Tensor:
        return [], f"held as a {type(weight.data).__name__}"
    if shared:
        return [], "tied to another module"
    if module.training:
        return [], "in training mode: call model.eval()"
    if reason := _unfit_device(weight.device, on_gpu):
        return [], reason
    if weight.dtype not in DTYPES:
        return [], f"of {weight.dtype}: cast the model to float16 or bfloat16".replace("torch.", "")
    if bias is not None and (bias.dtype, bias.device) != (weight.dtype, weight.device):
        return [], "its bias has another dtype or device"
    rows, columns = _matrix_shape(module)
    steps = {name: _steps(name, weight.dtype) for name in backends}
    fitting = [name for name, (out, into) in steps.items() if rows % out == 0 and columns % into == 0]
    if not fitting or not weight.numel():
        needed = ", ".join(f"{name} takes multiples of {out} by {into}" for name, (out, into) in steps.items())
        return [], f"its shape fits no backend ({rows} outputs by {columns} inputs; {needed})"
    broken = broken_groups(weight, _PATTERN, isinstance(module, Conv1D))
    if broken.any():
        return [], f"not 2:4 ({int(broken.sum()):,} of {broken.numel():,} groups hold more than 2)"
    if not bool(torch.isfinite(weight).all()):
        return [], "holds NaN or infinity"
    return fitting, ""


def _matrix_shape(module: nn.Module) -> tuple[int, ...]:
    shape = tuple(module.weight.shape)
    return shape[::-1] if type(module) is Conv1D else shape


def _unfit_device(device: torch.device, on_gpu: bool) -> str:
    """Why a weight on that device can't be converted, empty if it can."""
    if not _is_cuda(device):
        # A dry run without a GPU is about the rest; values that are not there can't be judged at all.
        return f"on {device.type}" if on_gpu or device.type == "meta" else ""
    major, minor = torch.cuda.get_device_capability(device)
    return f"on a GPU of compute capability {major}.{minor}: 8.0 is needed" if major < 8 else ""


def _steps(backend: str, dtype: torch.dtype) -> tuple[int, int]:
    """Of what rows and columns must be multiples. Where torch doesn't say, its own conversion refuses what it must."""
    constraints = getattr(BACKENDS[backend], "_DTYPE_SHAPE_CONSTRAINTS", {}).get(dtype)
    return getattr(constraints, "sparse_min_rows", 1), getattr(constraints, "sparse_min_cols", _PATTERN.group_size)


@torch.no_grad()
def _convert(module: nn.Module, backends: list[str]) -> tuple[list[str], str]:
    """Converts a layer with the first backend whose kernel gives back its weight; if none does, says why."""
    weight, failures = module.weight.detach(), []
    matrix = (weight.t() if isinstance(module, Conv1D) else weight).contiguous()
    for backend in backends:
        try:
            sparse = BACKENDS[backend].from_dense(matrix)
            exact = torch.equal(_dense(sparse, module.bias is not None), matrix)
        except RuntimeError as error:  # no kernel for this GPU, a build without the backend, no memory
            failures.append(f"{backend}: {(str(error).strip() or type(error).__name__).splitlines()[0]}")
            continue
        if exact:
            module.dense_requires_grad = module.weight.requires_grad
            module.weight = nn.Parameter(sparse, requires_grad=False)
            module.__class__ = _SPARSE_CLASSES[type(module)]
            return [backend], ""
        failures.append(f"{backend}: its kernel does not give back the weight")
    return [], f"refused by the backend ({'; '.join(failures)})"


@torch.no_grad()
def _dense(matrix: torch.Tensor, biased: bool = False) -> torch.Tensor:
    """The dense matrix, by the kernel that serves it: each sum has one term that is not zero, so it is exact."""
    outputs, inputs = matrix.shape
    bias = torch.zeros(outputs, dtype=matrix.dtype, device=matrix.device) if biased else None
    parts = torch.arange(inputs, device=matrix.device).split(_PROBES)
    unit_vectors = (functional.one_hot(part, inputs).to(matrix.dtype) for part in parts)
    return torch.cat([functional.linear(vectors, matrix, bias) for vectors in unit_vectors]).t().contiguous()

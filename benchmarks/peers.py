"""
What others offer for the same purpose, to measure beside it.

Masks are functions of a weight, the number kept and the group's sides. Each runs the tensor operations of its source,
in their order, written for this file; what can be imported is imported. One that is not installed is skipped.
"""

import types
from itertools import permutations

import torch
from torch import nn
from torch.nn import functional
from transformers import Trainer

from hf_admm import parse_pattern


# ---- Masks ----


def _groups(weight: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    if rows == 1:
        return weight.reshape(-1, columns)
    height, width = weight.shape
    blocks = weight.reshape(height // rows, rows, width // columns, columns)
    return blocks.transpose(1, 2).reshape(-1, rows * columns)


def _ungroup(groups: torch.Tensor, shape: torch.Size, rows: int, columns: int) -> torch.Tensor:
    if rows == 1:
        return groups.reshape(shape)
    height, width = shape
    return groups.reshape(height // rows, width // columns, rows, columns).transpose(1, 2).reshape(shape)


def topk_mask(weight: torch.Tensor, kept: int, rows: int, columns: int) -> torch.Tensor:
    """`torch.topk` (PyTorch, BSD-3) of the magnitudes of each group."""
    groups = _groups(weight, rows, columns).abs()
    mask = torch.zeros(groups.shape, dtype=torch.bool, device=weight.device)
    mask.scatter_(1, groups.topk(kept, dim=1, sorted=False).indices, True)
    return _ungroup(mask, weight.shape, rows, columns)


def kthvalue_mask(weight: torch.Tensor, kept: int, rows: int, columns: int) -> torch.Tensor:
    """`torch.kthvalue` (PyTorch, BSD-3) as a threshold, for groups as large as a weight. Ties may keep more."""
    groups = _groups(weight, rows, columns).abs()
    threshold = groups.kthvalue(groups.shape[1] - kept + 1, dim=1, keepdim=True).values
    return _ungroup(groups >= threshold, weight.shape, rows, columns)


def argsort_mask(weight: torch.Tensor, kept: int, rows: int, columns: int) -> torch.Tensor:
    """The mask of SR-STE's authors: github.com/aojunzz/NM-sparsity, devkit/sparse_ops/sparse_ops.py (Apache-2.0)."""
    groups = _groups(weight, rows, columns).abs()
    pruned = groups.argsort(dim=1)[:, : groups.shape[1] - kept]
    mask = torch.ones(groups.shape, device=weight.device).scatter_(1, pruned, 0)
    return _ungroup(mask, weight.shape, rows, columns)


_PATTERNS: dict[tuple[int, int], torch.Tensor] = {}


def asp_mask(weight: torch.Tensor, kept: int, rows: int, columns: int) -> torch.Tensor:
    """
    The mask of ASP, `create_mask` with `m4n2_1d`: github.com/NVIDIA/apex, contrib/sparsity/sparse_masklib.py (BSD-3),
    with the other N:M that its functions take, and on any device.
    """
    if rows != 1:
        raise NotImplementedError("blocks of several rows")
    if (kept, columns) not in _PATTERNS:
        one = [1.0] * kept + [0.0] * (columns - kept)
        _PATTERNS[kept, columns] = torch.tensor(sorted(set(permutations(one))))
    patterns = _PATTERNS[kept, columns].to(weight.device)
    matrix = weight.float().contiguous()
    mask = torch.ones_like(matrix, dtype=torch.int32).view(-1, columns)
    best = torch.argmax(torch.matmul(matrix.view(-1, columns).abs(), patterns.t()), dim=1)
    mask[:] = patterns[best]
    return mask.view(weight.shape).type(weight.type()).bool()


def pat_projection(weight: torch.Tensor, kept: int, rows: int, columns: int) -> torch.Tensor:
    """torchao's PAT, `NMSparseConstraint` on a copy: it projects in place, and the mask is where it left no zero."""
    from torchao.prototype.pat.group import KElementGrouper
    from torchao.prototype.pat.optim import NMSparseConstraint
    from torchao.prototype.pat.optim.prox_executor import apply_prox

    if rows != 1:
        raise NotImplementedError("blocks of several rows")
    weight = weight.clone()
    with torch.no_grad():
        apply_prox(
            KElementGrouper(weight, k=columns),
            NMSparseConstraint(0.0, n_nonzero=kept),
            weight,
            gamma=0.0,
            gamma_index_slope=0.0,
            disable_vmap=False,
            is_svd_grouper=False,
            zero_elts_are_counts=True,
        )
    return weight


class WeightNorm:
    """`torch.ao.pruning.WeightNormSparsifier` (PyTorch, BSD-3): a call is its `step` on one linear layer."""

    def __init__(self, weight: torch.Tensor, kept: int, rows: int, columns: int):
        from torch.ao.pruning import WeightNormSparsifier

        if rows * columns == weight.numel():
            settings = {"sparsity_level": 1 - kept / weight.numel(), "sparse_block_shape": (1, 1)}
            settings["zeros_per_block"] = 1
        else:
            settings = {"sparsity_level": 1.0, "sparse_block_shape": (rows, columns)}
            settings["zeros_per_block"] = rows * columns - kept
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device, dtype=weight.dtype)
        linear.weight.data.copy_(weight)
        self.model = nn.Sequential(linear)
        self.sparsifier = WeightNormSparsifier(**settings)
        self.sparsifier.prepare(self.model, config=[{"tensor_fqn": "0.weight"}])

    def __call__(self) -> torch.Tensor:
        self.sparsifier.step()
        return self.model[0].parametrizations["weight"][0].mask


def masks(weight: torch.Tensor, pattern: str) -> tuple[dict, dict]:
    """
    The rivals that can make a mask of this pattern.

    Args:
        weight (`torch.Tensor` of shape `(out_features, in_features)`):
            The weight.
        pattern (`str`):
            As `sparsity_pattern` takes it.

    Returns:
        `dict[str, Callable]`, `dict[str, str]`: Functions without arguments that return a tensor which is not zero
        where an entry is kept, and why the others are left out.
    """
    parsed = parse_pattern(pattern)
    if hasattr(parsed, "kept_of"):
        kept, rows, columns = parsed.kept_of(weight.numel()), *weight.shape
    else:
        rows = getattr(parsed, "rows", 1)
        kept, columns = parsed.kept, parsed.group_size // rows
    whole = rows * columns == weight.numel()
    group = (kept, 1, weight.numel()) if whole else (kept, rows, columns)
    found, left_out = {}, {}
    functions = {"torch.topk": topk_mask, "NM-sparsity argsort": argsort_mask}
    functions |= {"torch.kthvalue": kthvalue_mask} if whole else {"ASP": asp_mask, "PAT": pat_projection}
    for name, function in functions.items():
        # A first call on a corner tells whether it can: a missing package, or a pattern that it does not know.
        corner = weight[: 4 * rows, : 4 * columns].contiguous() if not whole else weight[:8, :8].contiguous()
        sides = (32, 1, 64) if whole else group
        try:
            function(corner, *sides)
        except (ImportError, NotImplementedError, RuntimeError) as error:
            left_out[name] = f"{type(error).__name__}: {error}"
        else:
            found[name] = lambda function=function: function(weight, *group)
    try:
        found["WeightNormSparsifier"] = WeightNorm(weight, kept, rows, columns)
    except (ImportError, RuntimeError) as error:
        left_out["WeightNormSparsifier"] = f"{type(error).__name__}: {error}"
    return found, left_out


# ---- Training ----


class SparseSTE(torch.autograd.Function):
    """SR-STE as its authors wrote it, with a mask in every forward: `Sparse` of the file of [`argsort_mask`]."""

    @staticmethod
    def forward(ctx, weight, kept, group_size, decay=2e-4):
        ctx.save_for_backward(weight)
        output = weight.clone()
        ctx.mask, ctx.decay = argsort_mask(weight.detach(), kept, 1, group_size), decay
        return output * ctx.mask

    @staticmethod
    def backward(ctx, gradient):
        (weight,) = ctx.saved_tensors
        return gradient + ctx.decay * (1 - ctx.mask) * weight, None, None, None


def use_sparse_ste(model: nn.Module, names: list[str], kept: int = 2, group_size: int = 4) -> None:
    """Lets the linear layers of these weights compute with what [`SparseSTE`] makes of them."""

    def forward(self, inputs):
        return functional.linear(inputs, SparseSTE.apply(self.weight, kept, group_size), self.bias)

    for name in names:
        module = model.get_submodule(name.removesuffix(".weight"))
        module.forward = types.MethodType(forward, module)


def pat_optimizer(model: nn.Module, names: list[str], args, kept: int = 2, group_size: int = 4):
    """torchao's PAT (BSD-3): its `PruneOptimizer` with the N:M constraint around the optimizer of `args`."""
    from torchao.prototype.pat.optim import PruneOptimizer

    kind, settings = Trainer.get_optimizer_cls_and_kwargs(args)
    pruned = [model.get_parameter(name) for name in names]
    others = [parameter for name, parameter in model.named_parameters() if name not in set(names)]
    constraint = {"group_type": "KElementGrouper", "k": group_size}
    constraint |= {"prox_type": "NMSparseConstraint", "n_nonzero": kept}
    return PruneOptimizer(kind([{"params": pruned, **constraint}, {"params": others}], **settings))


class AutogradPenaltyTrainer(Trainer):
    """
    The penalty as it is mostly written: `rho / 2 * ||W - Z + U||^2` is added to the loss in every forward, with Z and
    U both stored. Its updates of Z and U are left out, in its favour.
    """

    rho = 1e-2

    def hold(self, names: list[str], kept: int = 2, group_size: int = 4) -> None:
        """Makes Z and U of these weights."""
        self.held = []
        for name in names:
            weight = self.model.get_parameter(name)
            mask = topk_mask(weight.detach(), kept, 1, group_size)
            self.held.append((weight, weight.detach() * mask, torch.zeros_like(weight.detach())))

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        result = super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        loss, outputs = result if return_outputs else (result, None)
        loss = loss + sum(self.rho / 2 * (w - z + u).square().sum() for w, z, u in self.held)
        return (loss, outputs) if return_outputs else loss

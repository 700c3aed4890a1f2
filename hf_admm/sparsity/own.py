"""Weights that are sparse already, in whatever pattern: which they are, and what is said of them.

A weight that was trained densely has next to no exact zeros: none in float32, a few in a million in float16. A pruned
one has at least some percent. So a weight counts as sparse from 1 % of zeros on. One of zeros alone was not pruned but
begins there, as half of an adapter does, and has to learn.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from hf_admm.sparsity.matrices import (
    CONVOLUTION,
    EMBEDDING,
    FROZEN,
    FUSED_EXPERTS,
    ROUTER,
    TIED,
    Matrix,
    adapter_prefixes,
    how_to_fold,
    matrices,
    named_parameters,
)
from hf_admm.sparsity.naming import Names, check_exclude, check_include, matches
from hf_admm.sparsity.verdicts import Target, TargetSelection


SPARSE_FROM = 0.01
DENSE, ALL_ZERO = "dense", "all zero"
# What no pattern of groups is for, though a mask is. Not embeddings: their rows of zeros are padding or new tokens.
_MASKABLE = (TIED, CONVOLUTION, FUSED_EXPERTS, ROUTER, FROZEN)
_SHOWN = 16  # kinds of weights in one line


def count_zeros(weight: torch.Tensor, empty_rows: bool = True) -> int:
    """
    The zero entries of a weight. NaN is not zero. Where FSDP2 has sharded it, every process must call this.

    Args:
        weight (`torch.Tensor`):
            The weight, whole or sharded.
        empty_rows (`bool`, *optional*, defaults to `True`):
            Whether to count those of rows that are zero altogether.
    """
    zeros = weight.detach() == 0
    if not empty_rows:
        zeros = zeros.flatten(1).logical_and(~zeros.flatten(1).all(dim=1, keepdim=True))
    zeros = zeros.sum()
    return int(zeros.full_tensor() if hasattr(zeros, "full_tensor") else zeros)


def is_sparse(zeros: int, size: int) -> bool:
    """Whether a weight with so many zeros among its entries was pruned."""
    return SPARSE_FROM * size <= zeros < size


@dataclass(frozen=True)
class OwnSelection(TargetSelection):
    """
    The weights that are sparse already, and why the others get no mask.

    Args:
        zeros (`dict[str, int]`):
            The zeros of each matrix that may have a mask, of those that are left out too.
    """

    zeros: dict[str, int] = field(default_factory=dict)

    @property
    def frozen(self) -> dict[str, int]:
        """The zeros of sparse weights that are frozen, by name: nothing moves them."""
        left = {name: shape for name, (shape, reason) in self.left_out.items() if reason == FROZEN}
        return {n: self.zeros[n] for n, shape in left.items() if is_sparse(self.zeros[n], shape.numel())}

    def table(self) -> str:
        rows = [(name, target.shape, "sparse, keeps its zeros") for name, target in self.targets.items()]
        frozen = self.frozen
        for name, (shape, reason) in self.left_out.items():
            rows.append((name, shape, "sparse and frozen, stays as it is" if name in frozen else reason))
        cells = [("weight", "shape", "zeros", "what becomes of it")]
        for name, shape, reason in rows:
            zeros = f"{self.zeros[name] / max(1, shape.numel()):.2%}" if name in self.zeros else "-"
            cells.append((name, "x".join(map(str, shape)), zeros, reason))
        widths = [max(len(row[column]) for row in cells) for column in range(3)]
        lines = [f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}  {d}" for a, b, c, d in cells]
        return "\n".join([*lines, self.summary(), *filter(None, [self.warning()])])

    def summary(self) -> str:
        return "; ".join(f"{what}: {words}" for what, words in self.facts())

    def facts(self) -> list[tuple[str, str]]:
        """What becomes of the weights, and which they are: a heading and a line each."""
        facts, frozen = [], self.frozen
        if self.targets:
            entries, total = self._entries()
            held = {name: (self.zeros[name], target.shape.numel()) for name, target in self.targets.items()}
            share = f"{entries:,} entries, {entries / max(total, 1):.1%} of all matrices"
            facts.append(("keep their zeros", f"{len(held)} sparse weights ({share}): {_by_kind(held)}"))
        if frozen:
            held = {name: (zeros, self.left_out[name][0].numel()) for name, zeros in frozen.items()}
            facts.append(("stay as they are", f"{len(held)} sparse weights that are frozen: {_by_kind(held)}"))
        reasons = Counter(reason for name, (_, reason) in self.left_out.items() if name not in frozen)
        others = ", ".join(f"{count} {reason}" for reason, count in reasons.items()) or "none"
        return [*facts, ("without a mask", others)]

    def warning(self) -> str | None:
        """What should be said of sparse weights that can't have a mask: their zeros will be lost."""
        by_choice = (FROZEN, DENSE, ALL_ZERO, "adapter", "excluded by sparsity_exclude", "not in sparsity_include")
        lost = {
            name: f"{name} ({reason}, {self.zeros[name] / shape.numel():.1%} zeros)"
            for name, (shape, reason) in self.left_out.items()
            if reason not in by_choice and is_sparse(self.zeros.get(name, 0), shape.numel())
        }
        if not lost:
            return None
        return (
            f"The zeros of {len(lost)} weights are not kept: {', '.join(lost.values())}. Linear layers, "
            "convolutions, nn.MultiheadAttention and fused experts keep theirs; freeze the others "
            "(requires_grad_(False)) to leave them as they are."
        )


def select_own(model: nn.Module, include: Names = None, exclude: Names = None) -> OwnSelection:
    """
    Decides which weights of a model keep the zeros that they have.

    By default these are the sparse weights ([`is_sparse`]) of every linear layer, convolution, `nn.MultiheadAttention`
    and of fused experts, heads and tied ones included. `include` replaces that default, and takes a weight with any
    zero at all. Frozen weights need no mask; adapters, embeddings and what is zero altogether get none.

    Args:
        model (`nn.Module`):
            The model, with its weights.
        include, exclude (`list[str]` or `str`, *optional*):
            As for [`select_targets`].

    Returns:
        [`OwnSelection`]: With no target where all that is sparse is frozen, as under adapters.

    Raises:
        `ValueError`: If nothing is sparse, the weights are not there (on the meta device), or a name matches nothing
            or what can't have a mask.
    """
    known = matrices(model)
    check_include(known, include, exclude, accepted=_MASKABLE)
    check_exclude(model, known, exclude)
    if meta := [name for name, matrix in known.items() if matrix.parameter.is_meta]:
        raise ValueError(
            f"sparsity_pattern='own' reads the zeros of the weights, and those of {len(meta)} are not there, such as "
            f"{meta[0]} (on the meta device). Load the model with its weights on every process; under FSDP, with "
            "cpu_ram_efficient_loading set to false."
        )
    adapters = adapter_prefixes(model)
    targets, left_out, zeros = {}, {}, {}
    for name in named_parameters(model):
        if (matrix := known.get(name)) is None:
            continue
        shape = matrix.parameter.shape
        if not name.startswith(adapters):
            zeros[name] = count_zeros(matrix.parameter, empty_rows=matrix.fault != EMBEDDING)
        reason = "adapter" if name not in zeros else _reason(matrix, zeros[name], include, exclude)
        if reason:
            left_out[name] = (shape, reason)
        else:
            targets[name] = Target(name, shape, matrix.transposed)
    selection = OwnSelection(targets, left_out, zeros)
    if not targets and not selection.frozen:
        raise ValueError(_nothing_sparse(model, known.values(), selection, include, exclude))
    return selection


def _reason(matrix: Matrix, zeros: int, include: Names, exclude: Names) -> str | None:
    """Why a matrix gets no mask, `None` if it gets one."""
    if matrix.fault and matrix.fault not in _MASKABLE:
        return matrix.reason
    if exclude is not None and any(matches(name, exclude) for name in matrix.names):
        return "excluded by sparsity_exclude"
    if include is not None and not any(matches(name, include) for name in matrix.names):
        return "not in sparsity_include"
    size = matrix.parameter.numel()
    if zeros == size:
        return ALL_ZERO
    if not is_sparse(zeros, size) and not (include is not None and zeros):
        return DENSE
    return None if matrix.parameter.requires_grad else FROZEN


def _by_kind(held: Mapping[str, tuple[int, int]]) -> str:
    """Names with their share of zeros, those of the same place in all layers as one."""
    kinds = defaultdict(list)
    for name, (zeros, size) in held.items():
        kinds[re.sub(r"(?<=\.)\d+(?=\.)", "*", name.removesuffix(".weight"))].append(zeros / size)
    shown = []
    for kind, shares in list(kinds.items())[:_SHOWN]:
        low, high = f"{min(shares):.1%}", f"{max(shares):.1%}"
        count = f"{len(shares)} of " if len(shares) > 1 else ""
        shown.append(f"{count}{kind} ({low if low == high else f'{low} to {high}'} zeros)")
    more = f", and {len(kinds) - _SHOWN} other kinds" if len(kinds) > _SHOWN else ""
    return ", ".join(shown) + more


def _nothing_sparse(
    model: nn.Module, known: Iterable[Matrix], selection: OwnSelection, include: Names, exclude: Names
) -> str:
    counts = Counter(reason for _, reason in selection.left_out.values())
    reasons = ", ".join(f"{count} {reason}" for reason, count in counts.items()) or "it has no matrices"
    shares = {n: zeros / selection.left_out[n][0].numel() for n, zeros in selection.zeros.items() if zeros}
    advice = ["Load the sparse checkpoint"]
    if most := max(shares, key=shares.get, default=None):
        advice[0] += f" (here the most zeros has {most}, {shares[most]:.2%})"
    if folds := [how_to_fold(matrix) for matrix in known if matrix.fault == "parametrized"]:
        advice.append(f"fold masks that are parametrizations ({folds[0]})")
    advice.append("or give a pattern such as '2:4', to which this model is to be pruned")
    return (
        f"No weight of {type(model).__name__} is sparse, so there is no mask to keep: sparsity_pattern='own' takes "
        f"weights with at least {SPARSE_FROM:.0%} of zeros (sparsity_include={include!r}, "
        f"sparsity_exclude={exclude!r}; left out: {reasons}). {', '.join(advice)}."
    )

"""Where the zeros of a model are, and what was lost with them: one pass over its weights."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from hf_admm.audit_report import AuditReport, WeightAudit
from hf_admm.checkpoints.files import read_names, read_some
from hf_admm.checkpoints.folders import weight_folders
from hf_admm.sparsity.patterns import BlockPattern, DensityPattern, SparsityPattern, parse_pattern
from hf_admm.sparsity.projections import sparsity_mask, to_groups


# Of the weight that is shown: outputs by inputs.
SAMPLE_ROWS, SAMPLE_COLUMNS = 16, 32
_LARGEST_GROUP = 62  # bits of an int64, without its sign


@dataclass(frozen=True)
class Sample:
    """The upper left corner of a weight, `(out, in)`, in the dense model (`None` if it is not there) and in this."""

    name: str
    shape: tuple[int, ...]
    before: torch.Tensor | None
    after: torch.Tensor


@dataclass(frozen=True)
class LayerFigures:
    """
    What the report says of a weight.

    Args:
        audit ([`WeightAudit`]):
            What the audit found.
        lost (`float`, *optional*):
            The norm of what the weight of the dense model holds where this one is zero, as a share of its norm.
        least (`float`, *optional*):
            The same for the projection of the weight of the dense model: no mask of the pattern loses less.
    """

    audit: WeightAudit
    lost: float | None = None
    least: float | None = None

    @property
    def sparsity(self) -> float:
        """Its share of zeros."""
        return self.audit.zeros / self.audit.size if self.audit.size else 0.0


@dataclass(frozen=True)
class WeightFigures:
    """
    What the report says of the weights of a model.

    Args:
        report ([`AuditReport`]):
            What the audit found.
        layers (`list[LayerFigures]`):
            One for each weight that was audited.
        masks (`Counter[int]`):
            How many groups have which mask: entry i of a group, in its order, is bit i. Empty if there are no groups.
        sample ([`Sample`], *optional*):
            A part of one weight.
        stored (`int`):
            Bytes of the model, dense as it is stored.
        packed (`int`):
            Bytes of it if pruned weights were stored as what is not zero, and a bit for each entry.
    """

    report: AuditReport
    layers: list[LayerFigures]
    masks: Counter = field(default_factory=Counter)
    sample: Sample | None = None
    stored: int = 0
    packed: int = 0

    @property
    def lost(self) -> list[LayerFigures]:
        """The weights that were found in the dense model."""
        return [layer for layer in self.layers if layer.lost is not None]

    @property
    def group_sides(self) -> tuple[int, int]:
        """Outputs and inputs that a group spans, for patterns with groups."""
        pattern = parse_pattern(self.report.pattern)
        return (pattern.rows, pattern.columns) if isinstance(pattern, BlockPattern) else (1, pattern.group_size)


class DenseWeights:
    """
    The weights of a dense model, by the names that they have in another one, which may have put a head or a wrapper
    around it.

    Args:
        folder (`Path`):
            Its folder.

    Raises:
        `ValueError`: If it holds no safetensors.
    """

    def __init__(self, folder: Path):
        self.keys = {name: part for part in weight_folders(folder) for name in read_names(part)}

    def get(self, name: str, shape: tuple[int, ...]) -> torch.Tensor | None:
        """The weight of that name and shape, `None` if there is none or more than one that it might be."""
        name = name.rpartition("/")[2]  # a module of Sentence Transformers
        found = [name] if name in self.keys else [key for key in self.keys if _ends_alike(name, key)]
        if len(found) != 1:
            return None
        ((_, tensor),) = read_some(self.keys[found[0]], found)
        return tensor if tuple(tensor.shape) == shape else None


def _ends_alike(name: str, key: str) -> bool:
    return name.endswith(f".{key}") or key.endswith(f".{name}")


def weight_figures(
    tensors: Callable[[], Iterator[tuple[str, torch.Tensor]]],
    report: AuditReport,
    stored: int,
    dense: DenseWeights | None = None,
) -> WeightFigures:
    """
    Looks at the weights of a model, one at a time.

    Args:
        tensors (`Callable`):
            Gives the names and the tensors of the model, at least of what was audited.
        report ([`AuditReport`]):
            The audit of the same weights.
        stored (`int`):
            Bytes of the whole model.
        dense ([`DenseWeights`], *optional*):
            The dense model that it was made from.

    Returns:
        [`WeightFigures`]
    """
    pattern, audits = parse_pattern(report.pattern), {audit.name: audit for audit in report.weights}
    shown = report.sparse[len(report.sparse) // 2].name if report.sparse else None
    layers, masks, sample, packed = {}, Counter(), None, stored
    for name, tensor in tensors():
        audit = audits.get(name)
        if audit is None or not audit.sparse:
            continue
        before = dense.get(name, audit.shape) if dense else None
        layers[name] = _layer(audit, tensor, before, pattern)
        masks.update(_count_masks(tensor, pattern, audit.transposed))
        kept = audit.size - audit.zeros
        packed -= int((audit.size - kept) * tensor.element_size() - audit.size / 8)
        if name == shown:
            sample = Sample(name, audit.shape, _corner(before, audit), _corner(tensor, audit))
    found = [layers.get(audit.name, LayerFigures(audit)) for audit in report.weights]
    return WeightFigures(report, found, masks, sample, stored, packed)


def _layer(
    audit: WeightAudit, tensor: torch.Tensor, before: torch.Tensor | None, pattern: SparsityPattern
) -> LayerFigures:
    if before is None:
        return LayerFigures(audit)
    before = before.to(tensor.device)
    squares = before.double().square()
    total = squares.sum().item()
    if not total:
        return LayerFigures(audit)
    masks = (tensor != 0, sparsity_mask(before, pattern, audit.transposed))
    return LayerFigures(audit, *((squares[~mask].sum().item() / total) ** 0.5 for mask in masks))


def _corner(tensor: torch.Tensor | None, audit: WeightAudit) -> torch.Tensor | None:
    if tensor is None:
        return None
    matrix = tensor.t() if audit.transposed else tensor
    return matrix[:SAMPLE_ROWS, :SAMPLE_COLUMNS].detach().float().cpu().clone()


def _count_masks(tensor: torch.Tensor, pattern: SparsityPattern, transposed: bool) -> dict[int, int]:
    if isinstance(pattern, DensityPattern) or pattern.group_size > _LARGEST_GROUP:
        return {}
    groups = to_groups(tensor.detach() != 0, pattern, transposed)
    codes = torch.zeros(len(groups), dtype=torch.int64, device=groups.device)
    for place in range(pattern.group_size):
        codes |= groups[:, place].long() << place
    found, counts = codes.unique(return_counts=True)
    return dict(zip(found.tolist(), counts.tolist(), strict=True))

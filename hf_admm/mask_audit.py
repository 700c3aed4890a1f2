"""Is every zero of a mask still zero? Asked of live weights, or of a checkpoint and the sparse one that it came from.

The zeros of pattern `own` follow no rule, so they are compared:

- with `against`, each with the base: of every matrix of the base that is sparse and found in the checkpoint, under its
  name or one with other parts before it (`encoder.layer` and `bert.encoder.layer`);
- without, by their number: the record of a checkpoint says how many entries of each weight may be non-zero.

What becomes of rows that are zero altogether, which may be the padding of an embedding, is no matter unless the record
names the weight.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from hf_admm.audit_report import EMPTY_RECORD, AuditReport, WeightAudit
from hf_admm.checkpoints.files import read_names, read_some
from hf_admm.checkpoints.folders import Checkpoint, weight_folders
from hf_admm.sparsity.naming import matches
from hf_admm.sparsity.own import count_zeros, is_sparse
from hf_admm.sparsity.patterns import OWN


BY_NUMBER = "by the number of zeros; give --against BASE to compare each of them"


class MaskReport(AuditReport):
    """An [`AuditReport`] whose groups are the zeros of a mask, each by itself, and broken where they are lost."""

    unit, broken_unit, broken_label = "zeros to keep", "lost", "zeros lost"

    def _verdict(self) -> str:
        held = sum(weight.groups for weight in self.sparse)
        if self.failures:
            reasons = {"broken": "{0.broken:,} of {0.groups:,} zeros lost", "missing": "missing"}
            named = "; ".join(f"{w.name} ({reasons[w.status].format(w)})" for w in self.failures)
            return f"FAILED: {len(self.failures)} weight(s) do not have all of their zeros: {named}."
        if not self.ok:
            return (
                f"FAILED: {len(self.sparse)} weights have zeros to keep, and at least {self.at_least} were expected."
            )
        left = "; ".join(f"{name} ({reason})" for name, reason in self.released.items())
        without = f" Left without a mask: {left}." if left else ""
        return f"OK: of the {held:,} zeros of {len(self.sparse)} sparse weights none is lost.{without}"


def audit_masks(
    weights: Iterable[tuple[str, torch.Tensor, torch.Tensor, bool]],
    frozen: Iterable[tuple[str, torch.Size, int, int]] = (),
    released: Mapping[str, str] | None = None,
) -> MaskReport:
    """
    Audits the weights of a run whose pattern is their own.

    Args:
        weights (`Iterable[tuple[str, torch.Tensor, torch.Tensor, bool]]`):
            Name, tensor, mask, and whether the tensor is stored as `(in_features, out_features)`. Consumed one by one.
        frozen (`Iterable[tuple[str, torch.Size, int, int]]`, *optional*):
            Name, shape, and the zeros now and at first of weights that nothing should have moved.
        released (`Mapping[str, str]`, *optional*):
            Weights that have lost their mask in the run, and why.

    Returns:
        [`MaskReport`]
    """
    found = [_by_mask(*weight) for weight in weights]
    found += [_by_number(name, shape, now, first) for name, shape, now, first in frozen]
    return MaskReport(OWN, found, released=dict(released or {}))


def audit_own_checkpoint(
    checkpoint: Checkpoint, against: str | Path | None, entries: list[list[str] | str], at_least: int
) -> MaskReport:
    """
    Audits a checkpoint, see the module.

    Args:
        checkpoint ([`Checkpoint`]):
            The checkpoint.
        against (`str` or `Path`, *optional*):
            The sparse checkpoint that it came from.
        entries (`list`):
            Names of modules of which there must be a weight with zeros to keep, each by itself.
        at_least (`int`):
            How many weights must have zeros to keep.

    Returns:
        [`MaskReport`]

    Raises:
        `ValueError`: If there is neither a base nor a record to compare with, or a file is damaged.
    """
    if against is None and checkpoint.pattern != OWN:
        raise ValueError(
            f"{checkpoint.path} has no record of pattern own, so that nothing says which of its entries should be "
            "zero. Give the sparse checkpoint that it was trained from: --against BASE."
        )
    base = BaseMasks(Path(against)) if against is not None else None
    found, unmet = [], list(entries)
    for name, tensor, _, transposed in checkpoint.tensors():
        if tensor.dim() < 2 or not tensor.is_floating_point():
            continue
        kept = checkpoint.kept.get(name)
        mask = base.mask(name, tensor, recorded=kept is not None) if base else None
        if mask is not None:
            audit = _by_mask(name, tensor, mask, bool(transposed))
        elif kept is not None:
            zeros = count_zeros(tensor)
            audit = _by_number(name, tensor.shape, zeros, tensor.numel() - kept, bool(transposed))
        else:
            audit = WeightAudit(name, tuple(tensor.shape), "dense", count_zeros(tensor))
        found.append(audit)
        if audit.groups:
            plain = name.removesuffix(".weight")
            unmet = [entry for entry in unmet if not (matches(plain, entry) or matches(name, entry))]
    unmet = [entry if isinstance(entry, str) else entry[0] for entry in unmet]
    found += [WeightAudit(name, (), "missing") for name in [*checkpoint.unseen, *unmet]]
    note = EMPTY_RECORD if checkpoint.recorded == 0 and base is None else "" if base else BY_NUMBER
    if base and (unused := base.unused()):
        note = f"sparse in the base and not in the checkpoint: {', '.join(unused)}"
    return MaskReport(OWN, found, recorded=checkpoint.recorded, note=note, at_least=at_least)


class BaseMasks:
    """
    The zeros of a sparse checkpoint, a weight at a time.

    Args:
        path (`Path`):
            Its folder, or one file.

    Raises:
        `ValueError`: If there are no safetensors, or a file is damaged.
    """

    def __init__(self, path: Path):
        # A key may stand in several parts: those of Sentence Transformers.
        self.keys = [(folder, key) for folder in weight_folders(path) for key in sorted(read_names(folder))]
        self.taken: set[tuple[Path, str]] = set()

    def mask(self, name: str, tensor: torch.Tensor, recorded: bool) -> torch.Tensor | None:
        """
        Where the weight of the base that a tensor comes from is not zero.

        Args:
            name (`str`), tensor (`torch.Tensor`):
                Of the checkpoint.
            recorded (`bool`):
                Whether the checkpoint says that it has zeros to keep.

        Returns:
            `torch.BoolTensor`, or `None` if the base has no such weight, or it is not sparse there.
        """
        name = name.rpartition("/")[2]  # the folder of a part
        alike = [place for place in self.keys if place not in self.taken and _same(place[1], name)]
        for place in sorted(alike, key=lambda place: (place[1] != name, -len(place[1]))):
            weight = self._read(place)
            if weight.shape == tensor.shape:
                self.taken.add(place)
                return weight != 0 if recorded or looks_sparse(weight) else None
        return None

    def unused(self) -> list[str]:
        """The sparse weights of the base that no tensor has asked for."""
        left = [place for place in self.keys if place not in self.taken]
        return [place[1] for place in left if looks_sparse(self._read(place))]

    @staticmethod
    def _read(place: tuple[Path, str]) -> torch.Tensor:
        folder, key = place
        [(_, weight)] = read_some(folder, [key])
        return weight


def looks_sparse(weight: torch.Tensor) -> bool:
    """Whether a tensor of a checkpoint was pruned, rows of zeros left out."""
    if weight.dim() < 2 or not weight.is_floating_point():
        return False
    rows = weight.flatten(1)
    zeros = (rows == 0).sum(dim=1)
    alive = zeros < rows.shape[1]
    return is_sparse(int(zeros[alive].sum()), int(alive.sum()) * rows.shape[1])


def _same(key: str, name: str) -> bool:
    """Whether two names are the same but for what stands before the shorter one."""
    return key == name or key.endswith(f".{name}") or name.endswith(f".{key}")


def _by_mask(name: str, tensor: torch.Tensor, mask: torch.Tensor, transposed: bool) -> WeightAudit:
    lost = int(((tensor != 0) & ~mask).sum())
    held = mask.numel() - int(mask.count_nonzero())
    status = "broken" if lost else "ok" if held else "dense"
    return WeightAudit(name, tuple(tensor.shape), status, count_zeros(tensor), held, lost, transposed)


def _by_number(name: str, shape: torch.Size, zeros: int, held: int, transposed: bool = False) -> WeightAudit:
    lost = max(0, held - zeros)
    return WeightAudit(name, tuple(shape), "broken" if lost else "ok", zeros, held, lost, transposed)

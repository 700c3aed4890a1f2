"""Does every group of every sparse weight obey its pattern? Asked of live weights, or of any checkpoint on disk.

A checkpoint is audited from its safetensors alone, an exported model from its ONNX file alone, one tensor in memory at
a time. Which of the weights should be sparse is told by the record that training leaves beside them ([`read_record`])
and an export takes along; matrices that no record names are judged by their zeros:

- Zeros that a weight has lost leave no trace: without a record, it passes for dense unless it is named as expected.
- A dense weight has next to no exact zeros, and a pruned one keeps nearly all of its zeros when some entries are
  edited afterwards. So a matrix counts as sparse from half of the zeros that the pattern prescribes, that is
  `(1 - density) / 2` of its entries: at `2:4`, one entry may have been changed in every group and it still counts.
- Rows of zeros are left out of that count, because they are the padding or the unused tokens of an embedding.
- safetensors does not say whether a matrix is `(out, in)` or transposed, as in GPT-2's `Conv1D`, so both ways are
  tried and the one with fewer broken groups is taken, `(out, in)` if they are equal. The graph of an ONNX file says.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from hf_admm.checkpoints.folders import Checkpoint
from hf_admm.checkpoints.onnx_files import ONNX_SUFFIX, OnnxModel
from hf_admm.sparsity.naming import check_expression, matches, name_entries
from hf_admm.sparsity.patterns import OWN, OwnPattern, SparsityPattern, parse_pattern
from hf_admm.sparsity.projections import broken_groups


DEFAULT_PATTERN = "2:4"

_PACKED = getattr(torch, "float4_e2m1fn_x2", "not in this version of torch")
_SPARSE = ("ok", "broken")
NO_RECORD = "no record: judged by zeros"
EMPTY_RECORD = "its record names no weight, so it was not written by a whole save: restore it, or name what to expect"
_FAILED = ("broken", "misfit", "missing")


@dataclass(frozen=True)
class WeightAudit:
    """
    What the audit found in one weight.

    Args:
        name (`str`):
            Its parameter name or state dict key.
        shape (`tuple[int, ...]`):
            Its shape as stored, empty if it is missing.
        status (`str`):
            `"ok"`: sparse, every group obeys the pattern. `"broken"`: should be sparse, but some groups hold too many
            non-zero entries. `"misfit"`: should be sparse, but the pattern does not fit its shape. `"missing"`: should
            be sparse, but is not there. `"dense"`: not meant to be sparse. `"odd shape"`: looks pruned, though not by
            this pattern, which does not fit its shape; no record says that it should. `"all zero"`: nothing but zeros.
        zeros (`int`, *optional*, defaults to 0):
            Its zero entries. NaN and infinity are not zero.
        groups (`int`, *optional*, defaults to 0):
            Its groups, 0 if it was not divided into groups.
        broken (`int`, *optional*, defaults to 0):
            The groups with more non-zero entries than the pattern allows.
        transposed (`bool`, *optional*, defaults to `False`):
            Whether it was read as `(in, out)`.
    """

    name: str
    shape: tuple[int, ...]
    status: str
    zeros: int = 0
    groups: int = 0
    broken: int = 0
    transposed: bool = False

    @property
    def size(self) -> int:
        """Its entries, 0 if it is missing."""
        return torch.Size(self.shape).numel() if self.shape else 0

    @property
    def sparse(self) -> bool:
        """Whether its groups were checked."""
        return self.status in _SPARSE

    @property
    def failed(self) -> bool:
        """Whether it should obey the pattern and does not."""
        return self.status in _FAILED


@dataclass(frozen=True)
class AuditReport:
    """
    What the audit found in a model.

    Args:
        pattern (`str`):
            The pattern it was checked against.
        weights (`list[WeightAudit]`):
            One entry for each weight, in the order of the model or file.
        released (`dict[str, str]`, *optional*):
            Weights that training left dense though it could have pruned them, and why.
        recorded (`int`, *optional*):
            How many weights the record of a checkpoint names. `None` if it has none, or for live weights.
        note (`str`, *optional*, defaults to `""`):
            By what a checkpoint was judged if not by a record alone.
        at_least (`int`, *optional*, defaults to 1):
            How many weights must be sparse.
    """

    pattern: str
    weights: list[WeightAudit]
    released: dict[str, str] = field(default_factory=dict)
    recorded: int | None = None
    note: str = ""
    at_least: int = 1
    unit, broken_unit, broken_label = "groups", "broken", "broken groups"  # what is counted, in words

    @property
    def sparse(self) -> list[WeightAudit]:
        """The weights whose groups were checked."""
        return [weight for weight in self.weights if weight.sparse]

    @property
    def failures(self) -> list[WeightAudit]:
        """The weights that should obey the pattern and do not."""
        return [weight for weight in self.weights if weight.failed]

    @property
    def sparsity(self) -> float:
        """Share of zeros among the entries of the sparse weights, 0 if there are none."""
        size = sum(weight.size for weight in self.sparse)
        return sum(weight.zeros for weight in self.sparse) / size if size else 0.0

    @property
    def violations(self) -> int:
        """Broken groups of all weights together."""
        return sum(weight.broken for weight in self.weights)

    @property
    def ok(self) -> bool:
        """Whether enough weights are sparse and none that should obey the pattern fails to."""
        return len(self.sparse) >= self.at_least and not self.failures and self.note != EMPTY_RECORD

    def verdict(self) -> str:
        """One line that says whether the model obeys the pattern and, if not, names the weights that fail."""
        line = self._verdict()
        return f"{line[:-1]} ({self.note})." if self.note else line

    def _verdict(self) -> str:
        if not self.sparse and not self.failures:
            return f"FAILED: no weight is sparse under pattern {self.pattern}."
        if not self.ok and not self.failures:
            wanted = f", and at least {self.at_least} were expected" if len(self.sparse) < self.at_least else ""
            return f"FAILED: {len(self.sparse)} weights are sparse under pattern {self.pattern}{wanted}."
        if self.ok:
            left = "; ".join(f"{name} ({reason})" for name, reason in self.released.items())
            dense = f" Left dense: {left}." if left else ""
            return f"OK: every group of every sparse weight ({len(self.sparse)} of them) obeys {self.pattern}.{dense}"
        reasons = {
            "broken": "{0.broken} of {0.groups} groups broken",
            "misfit": "pattern does not fit its shape {0.shape}",
            "missing": "missing",
        }
        named = "; ".join(f"{weight.name} ({reasons[weight.status].format(weight)})" for weight in self.failures)
        return f"FAILED: pattern {self.pattern} is broken by {len(self.failures)} weight(s): {named}."

    def table(self) -> str:
        """A plain-text table with a row for each weight and a last line that sums up."""
        rows = [("weight", "shape", "zeros", self.unit, self.broken_unit, "status")]
        for weight in self.weights:
            shape = "x".join(map(str, weight.shape)) or "-"
            zeros = f"{weight.zeros / weight.size:.1%}" if weight.size else "-"
            groups, broken = (str(weight.groups), str(weight.broken)) if weight.sparse else ("-", "-")
            status = f"{weight.status} (transposed)" if weight.transposed else weight.status
            rows.append((weight.name, shape, zeros, groups, broken, status))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = []
        for name, *numbers, status in rows:
            cells = [cell.rjust(width) for cell, width in zip(numbers, widths[1:-1], strict=True)]
            lines.append("  ".join([name.ljust(widths[0]), *cells, status]))
        lines.insert(1, "-" * (sum(widths) + 2 * (len(widths) - 1)))
        lines += [f"left dense: {name} ({reason})" for name, reason in self.released.items()]
        groups = sum(weight.groups for weight in self.sparse)
        lines.append(
            f"pattern {self.pattern}: {len(self.sparse)} of {len(self.weights)} weights sparse, "
            f"{self.sparsity:.2%} zeros, {self.violations} of {groups} {self.unit} {self.broken_unit}"
        )
        return "\n".join(lines)

    def to_dict(self) -> dict:
        """The report as plain numbers, strings and lists, fit for JSON."""
        return {
            "pattern": self.pattern,
            "ok": self.ok,
            "recorded": self.recorded,
            "note": self.note,
            "sparsity": self.sparsity,
            "violations": self.violations,
            "released": self.released,
            "weights": [{**asdict(weight), "shape": list(weight.shape)} for weight in self.weights],
        }


def audit_weights(
    weights: Iterable[tuple[str, torch.Tensor, bool]],
    pattern: SparsityPattern | str,
    released: Mapping[str, str] | None = None,
) -> AuditReport:
    """
    Audits weights that should all obey the pattern.

    Args:
        weights (`Iterable[tuple[str, torch.Tensor, bool]]`):
            Name, tensor, and whether the tensor is stored as `(in_features, out_features)`. Consumed one by one.
        pattern ([`SparsityPattern`] or `str`):
            The pattern.
        released (`Mapping[str, str]`, *optional*):
            Weights that were to obey it, or are trained like those, and stay dense; and why.

    Returns:
        [`AuditReport`]

    Raises:
        `ValueError`: If the pattern string is invalid.
    """
    pattern = parse_pattern(str(pattern))
    return AuditReport(
        str(pattern), [_audit_target(*weight, pattern) for weight in weights], released=dict(released or {})
    )


def audit_checkpoint(
    path: str | Path,
    pattern: SparsityPattern | str | None = None,
    expect: list[str] | str | None = None,
    at_least: int = 1,
    against: str | Path | None = None,
) -> AuditReport:
    """
    Audits a checkpoint from its safetensors alone, or an ONNX file; no model is built.

    Args:
        path (`str` or `Path`):
            A folder with `model.safetensors` or with an index and its shards, one of Sentence Transformers or with its
            weights in folders of that one, or one `.safetensors` or `.onnx` file (needs the package `onnx`).
        pattern ([`SparsityPattern`] or `str`, *optional*):
            The pattern. Defaults to the recorded one if the checkpoint holds a record, else to `"2:4"`.
        expect (`list[str]` or `str`, *optional*):
            Names of modules whose weights must be sparse, record or not, in PEFT's convention (see [`matches`]).
        at_least (`int`, *optional*, defaults to 1):
            How many weights must be sparse.
        against (`str` or `Path`, *optional*):
            A sparse checkpoint whose zeros must all be there, in whatever pattern they lie.

    Returns:
        [`AuditReport`]: The targets that the record names and the weights that are expected, which must be present and
        obey; and every other floating-point matrix, which must obey if it looks pruned (see the module for the rule).
        With `against`, or if the pattern is `"own"`, a [`MaskReport`] (see `hf_admm.mask_audit`).

    Raises:
        `ValueError`: If there are no safetensors, a file is damaged or missing, the pattern is invalid, or there is
            nothing that its zeros could be compared with.
    """
    check_expression(expect, "--expect")
    path = Path(path)
    if against is not None and str(pattern or OWN) != OWN:
        raise ValueError(
            f"--against compares each zero with the base's, and --pattern {pattern} asks for another. Give one of "
            "them."
        )
    if against is not None and path.suffix == ONNX_SUFFIX:
        raise ValueError(
            f"--against compares checkpoints, whose weights lie the same way; {path} is an ONNX file. Compare the "
            "checkpoint that it was exported from."
        )
    checkpoint = (OnnxModel if path.suffix == ONNX_SUFFIX else Checkpoint).find(path)
    pattern = parse_pattern(str(pattern or checkpoint.pattern or DEFAULT_PATTERN))
    entries = name_entries(expect)
    if against is not None or isinstance(pattern, OwnPattern):
        from hf_admm.mask_audit import audit_own_checkpoint  # which builds on this module

        return audit_own_checkpoint(checkpoint, against, entries, at_least)
    weights, unmet = [], list(entries)
    for name, tensor, recorded, transposed in checkpoint.tensors():
        matrix = tensor.dim() == 2 and tensor.is_floating_point()
        if not (recorded or matrix):
            continue
        if tensor.dtype == _PACKED:
            raise ValueError(
                f"{name} in {path} is of dtype {tensor.dtype}, which packs two numbers into a byte, so that its zeros "
                "can't be counted. Audit the checkpoint that it was quantized from."
            )
        wanted = [entry for entry in entries if matches(name.removesuffix(".weight"), entry) or matches(name, entry)]
        unmet = [entry for entry in unmet if entry not in wanted]
        judged = _audit_target(name, tensor, transposed, pattern) if recorded else None
        weights.append(judged or _audit_unknown(name, tensor, transposed, pattern, expected=bool(wanted)))
    unmet = [entry if isinstance(entry, str) else entry[0] for entry in unmet]
    weights += [WeightAudit(name, (), "missing") for name in [*checkpoint.unseen, *unmet]]
    note = {None: NO_RECORD, 0: EMPTY_RECORD}.get(checkpoint.recorded, "")
    if note and entries:
        note = f"{NO_RECORD if checkpoint.recorded is None else 'its record names no weight'}, and by --expect"
    return AuditReport(str(pattern), weights, recorded=checkpoint.recorded, note=note, at_least=at_least)


def _audit_target(name: str, tensor: torch.Tensor, transposed: bool, pattern: SparsityPattern) -> WeightAudit:
    """Audits a weight that should obey the pattern, stored as told."""
    shape, zeros = tuple(tensor.shape), int((tensor == 0).sum())
    if not _fits(tensor, pattern, transposed):
        return WeightAudit(name, shape, "misfit", zeros, transposed=transposed)
    broken = broken_groups(tensor, pattern, transposed)
    count = int(broken.sum())
    return WeightAudit(name, shape, "broken" if count else "ok", zeros, broken.numel(), count, transposed)


def _audit_unknown(
    name: str, tensor: torch.Tensor, transposed: bool | None, pattern: SparsityPattern, expected: bool = False
) -> WeightAudit:
    """Audits a matrix without a record: whether it should be sparse and, if that is unknown, how it is stored."""
    shape, zeros = tuple(tensor.shape), int((tensor == 0).sum())
    if zeros == tensor.numel() and not expected:
        return WeightAudit(name, shape, "all zero", zeros)
    if not expected and not _looks_pruned(tensor.t() if transposed else tensor, pattern):
        return WeightAudit(name, shape, "dense", zeros)
    ways = (False, True) if transposed is None else (transposed,)
    ways = [way for way in ways if _fits(tensor, pattern, way)]
    if not ways:
        return WeightAudit(name, shape, "misfit" if expected else "odd shape", zeros)
    return min((_audit_target(name, tensor, way, pattern) for way in ways), key=lambda audit: audit.broken)


def _fits(tensor: torch.Tensor, pattern: SparsityPattern, transposed: bool) -> bool:
    if tensor.dim() != 2:
        return False
    rows, columns = tensor.shape
    return (pattern.misfit(columns, rows) if transposed else pattern.misfit(rows, columns)) is None


def _looks_pruned(matrix: torch.Tensor, pattern: SparsityPattern) -> bool:
    """Whether half of the zeros that the pattern prescribes are there, rows of zeros left out."""
    zeros_in_row = (matrix == 0).sum(dim=1)
    alive = zeros_in_row < matrix.shape[1]
    zeros, size = int(zeros_in_row[alive].sum()), int(alive.sum()) * matrix.shape[1]
    return zeros > 0 and zeros >= (1 - pattern.density) / 2 * size

"""What an audit found, in figures and in words."""

from dataclasses import asdict, dataclass, field

import torch


_SPARSE = ("ok", "broken")
_FAILED = ("broken", "misfit", "missing")
NO_RECORD = "no record: judged by zeros"
EMPTY_RECORD = "its record names no weight, so it was not written by a whole save: restore it, or name what to expect"


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

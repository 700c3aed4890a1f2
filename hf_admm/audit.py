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
from pathlib import Path

import torch

from hf_admm.audit_report import EMPTY_RECORD, NO_RECORD, AuditReport, WeightAudit
from hf_admm.checkpoints.folders import Checkpoint
from hf_admm.checkpoints.onnx_files import ONNX_SUFFIX, OnnxModel
from hf_admm.sparsity.naming import check_expression, matches, name_entries
from hf_admm.sparsity.patterns import OWN, OwnPattern, SparsityPattern, parse_pattern
from hf_admm.sparsity.projections import broken_groups


DEFAULT_PATTERN = "2:4"

_PACKED = getattr(torch, "float4_e2m1fn_x2", "not in this version of torch")


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

"""`hf-admm export`: a sparse checkpoint as an ONNX file, checked against PyTorch."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from hf_admm.checkpoints.files import SparsityRecord, read_record
from hf_admm.checkpoints.saved_names import saved_names
from hf_admm.commands.loading import load_model
from hf_admm.export import TOLERANCES, check_packages, export_onnx


_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in TOLERANCES}
_DESCRIPTION = """\
Exports a checkpoint that takes tokens (classification, embeddings, causal language models without a cache) to ONNX by
torch's exporter, for any batch and sequence length. The sparse weights that the checkpoint records must be in the file
bit for bit, and ONNX Runtime must compute what PyTorch does. Needs pip install hf-admm[onnx].
"""
_EXIT_CODES = "exit code: 0 exported, 2 bad input, or an export that failed a check, which is not written"


def main(argv: Sequence[str] | None = None) -> int:
    """
    Runs `hf-admm export MODEL_DIR OUT.onnx [--dtype float32] [--opset N] [--external_data] [--json]`.

    Args:
        argv (`Sequence[str]`, *optional*):
            The arguments after the command's name. Defaults to those of the process.

    Returns:
        `int`: 0.

    Raises:
        `ValueError`: If the checkpoint can't be loaded or exported, or the export fails a check.
    """
    args = _parser().parse_args(argv)
    folder = Path(args.model_dir)
    if not folder.is_dir():
        raise ValueError(f"{args.model_dir!r} is not a folder. Give the folder of a checkpoint, with its config.json.")
    check_packages()
    model = load_model(args.model_dir, _DTYPES[args.dtype], 1)
    report = export_onnx(model, args.out, _record(model, folder), args.opset, args.external_data or None)
    if args.json:
        shapes = {f"{batch}x{tokens}": worst for (batch, tokens), worst in report.differences.items()}
        audit = report.audit.to_dict() if report.audit else None
        print(json.dumps({**vars(report), "differences": shapes, "audit": audit}, indent=2))
    else:
        print(report.summary())
    return 0


def _record(model, folder: Path) -> SparsityRecord | None:
    """The record of a checkpoint, by the names of the parameters where they are saved under others."""
    record = read_record(folder)
    if record is None:
        return None
    keys = saved_names(model, dict(model.named_parameters()), folder)
    targets = {name: record.targets[key] for name, key in keys.items() if key in record.targets}
    if lost := set(record.targets) - {keys[name] for name in targets}:
        raise ValueError(
            f"The record of {folder} names weights that {type(model).__name__} does not have as they are saved: "
            f"{', '.join(sorted(lost))}. Remove the record to export without it."
        )
    kept = {name: record.kept[key] for name, key in keys.items() if key in record.kept}
    return SparsityRecord(record.pattern, targets, kept)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("hf-admm export", description=_DESCRIPTION, epilog=_EXIT_CODES)
    parser.add_argument("model_dir", help="folder of a checkpoint that save_pretrained wrote")
    parser.add_argument("out", help="the file to write, such as model.onnx")
    parser.add_argument("--dtype", choices=_DTYPES, default="float32", help="dtype of the weights (default: float32)")
    parser.add_argument("--opset", type=int, metavar="N", help="version of ONNX's operators (default: the exporter's)")
    parser.add_argument(
        "--external_data", action="store_true", help="weights in OUT.onnx.data beside it (default: from 2 GB on)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the summary")
    return parser

"""`hf-admm verify`: does every group of a checkpoint's sparse weights obey its pattern?"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download

from hf_admm.audit import audit_checkpoint
from hf_admm.checkpoints.files import INDEX_NAME, RECORD_NAME
from hf_admm.checkpoints.folders import MODULES_NAME
from hf_admm.sparsity.naming import as_names


_DESCRIPTION = """\
Audits a checkpoint from its safetensors alone, or an ONNX file, and prints a table of its matrices. Those that are
recorded as sparse (in hf_admm.json, or in the ONNX file by hf-admm export) and those named by --expect must be there
and obey the pattern; any other must obey it if it looks pruned. Without a record, a weight that lost its zeros passes
for a dense one: name what you expect. With --against, each zero is compared with those of the sparse checkpoint that
training began with.
"""
_EXIT_CODES = (
    "exit code: 0 all is well, 1 a weight breaks the pattern or is missing, or too few are sparse, 2 bad input"
)


def main(argv: Sequence[str] | None = None) -> int:
    """
    Runs `hf-admm verify PATH_OR_ID [--pattern 2:4] [--expect NAMES...] [--at_least N] [--against BASE] [--json]
    [--quiet]`.

    Args:
        argv (`Sequence[str]`, *optional*):
            The arguments after the command's name. Defaults to those of the process.

    Returns:
        `int`: 0 if every sparse weight obeys the pattern, 1 if one does not or if there are too few.

    Raises:
        `ValueError`: If the checkpoint cannot be found or read, or the pattern is invalid.
    """
    args = _parser().parse_args(argv)
    folder = _local(args.path_or_id)
    against = None if args.against is None else _local(args.against)
    report = audit_checkpoint(folder, args.pattern, as_names(args.expect), args.at_least, against)
    if args.json:
        print(json.dumps({"path": str(folder), **report.to_dict(), "verdict": report.verdict()}, indent=2))
    else:
        if not args.quiet:
            print(report.table())
        print(report.verdict())
    return 0 if report.ok else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("hf-admm verify", description=_DESCRIPTION, epilog=_EXIT_CODES)
    parser.add_argument(
        "path_or_id", help="folder of a checkpoint, a .safetensors or .onnx file, or the id of a model on the hub"
    )
    parser.add_argument(
        "--pattern", help="pattern to check, such as 2:4, 4x4:8 or 0.5 (default: the one that is recorded, else 2:4)"
    )
    parser.add_argument(
        "--expect",
        nargs="+",
        metavar="NAME",
        help="modules that must be sparse, record or not, as for sparsity_include: suffixes of their names, such as "
        "query value, or one regular expression",
    )
    parser.add_argument(
        "--at_least", type=int, default=1, metavar="N", help="how many weights must be sparse (default: 1)"
    )
    parser.add_argument(
        "--against",
        metavar="BASE",
        help="a sparse checkpoint (a folder, a file or an id) that this one was trained from: each of its zeros must "
        "be there, whatever their pattern",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--quiet", action="store_true", help="print the verdict alone, the last line")
    return parser


def _local(path_or_id: str) -> Path:
    """The path itself if it exists, else the downloaded safetensors of the model with that id."""
    path = Path(path_or_id)
    try:
        if path.exists():
            return path
        # The dense working weights of an interrupted run may be safetensors too, and are not the model.
        wanted = ["model*.safetensors", INDEX_NAME, RECORD_NAME, MODULES_NAME]
        wanted += [f"[0-9]_*/{name}" for name in wanted[:3]]  # modules of Sentence Transformers
        return Path(snapshot_download(path_or_id, allow_patterns=wanted))
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{path_or_id!r} is neither an existing path nor a model that can be downloaded from the hub ({reason}). "
            "Give the folder of a checkpoint, a .safetensors or .onnx file, or the id of a model, such as 'org/name'."
        ) from error

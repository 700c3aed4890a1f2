"""`hf-admm report`: a run as one page, from what it left."""

import argparse
from collections.abc import Sequence

from hf_admm.visualization.report import write_report


_DESCRIPTION = """\
Writes the report of a run: one HTML page that needs nothing but itself, and its figures as PNG files. It is made from
what the run logged and saved; nothing is trained or downloaded. What is not there is left out, and the page says why.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """
    Runs `hf-admm report RUN_DIR [--model DIR] [--start PATH_OR_ID] [--output_dir DIR]`.

    Args:
        argv (`Sequence[str]`, *optional*):
            The arguments after the command's name. Defaults to those of the process.

    Returns:
        `int`: 0.

    Raises:
        `ValueError`: If matplotlib is not installed, or there is nothing to report.
    """
    args = _parser().parse_args(argv)
    print(write_report(args.run_dir, args.model, args.start, args.output_dir))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("hf-admm report", description=_DESCRIPTION)
    parser.add_argument("run_dir", help="output_dir of a run, or the folder of a checkpoint")
    parser.add_argument(
        "--model", metavar="DIR", help="folder of the model (default: model/ in the run, itself, its last checkpoint)"
    )
    parser.add_argument(
        "--start",
        metavar="PATH_OR_ID",
        help="dense model that the run started from: a folder, or an id in the hub's cache (default: what the run "
        "noted)",
    )
    parser.add_argument("--output_dir", metavar="DIR", help="where to write it (default: report/ in the run)")
    return parser

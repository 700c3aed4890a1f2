"""`hf-admm pack`: a sparse checkpoint in the bytes of its values and their positions, for storage."""

import argparse
from collections.abc import Sequence

from hf_admm.packing.checkpoints import pack_checkpoint


_DESCRIPTION = """\
Packs the sparse weights of a checkpoint, lossless: 2:4 weights in bf16 take 0.54 of their dense bytes. All else is
copied as it is; what only a resume reads is left out. `hf-admm unpack` restores the plain checkpoint, which loads.
"""
_EXIT_CODES = "exit code: 0 all is well, 2 bad input, such as a checkpoint of which nothing is sparse"


def main(argv: Sequence[str] | None = None) -> int:
    """
    Runs `hf-admm pack SOURCE DESTINATION [--pattern 2:4]`.

    Args:
        argv (`Sequence[str]`, *optional*):
            The arguments after the command's name. Defaults to those of the process.

    Returns:
        `int`: 0.

    Raises:
        `ValueError`: If the source can't be read or nothing of it is sparse, the pattern is invalid, or the
            destination exists or can't be written.
    """
    parser = argparse.ArgumentParser("hf-admm pack", description=_DESCRIPTION, epilog=_EXIT_CODES)
    parser.add_argument("source", help="folder of a checkpoint, or a .safetensors file")
    parser.add_argument("destination", help="folder or .safetensors file to write, which must not exist")
    parser.add_argument(
        "--pattern", help="pattern of the weights, such as 2:4 (default: the one that is recorded, else 2:4)"
    )
    args = parser.parse_args(argv)
    print(pack_checkpoint(args.source, args.destination, args.pattern).table())
    return 0

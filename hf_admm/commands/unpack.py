"""`hf-admm unpack`: the plain checkpoint that was packed."""

import argparse
from collections.abc import Sequence

from hf_admm.packing.checkpoints import unpack_checkpoint


_DESCRIPTION = """\
Restores a checkpoint that `hf-admm pack` wrote: the files with tensors byte for byte, checked by their checksums.
"""
_EXIT_CODES = "exit code: 0 all is well, 2 bad input, such as a damaged file"


def main(argv: Sequence[str] | None = None) -> int:
    """
    Runs `hf-admm unpack SOURCE DESTINATION`.

    Args:
        argv (`Sequence[str]`, *optional*):
            The arguments after the command's name. Defaults to those of the process.

    Returns:
        `int`: 0.

    Raises:
        `ValueError`: If the source is not packed or is damaged, or the destination exists or can't be written.
    """
    parser = argparse.ArgumentParser("hf-admm unpack", description=_DESCRIPTION, epilog=_EXIT_CODES)
    parser.add_argument("source", help="folder or file that `hf-admm pack` wrote")
    parser.add_argument("destination", help="folder or .safetensors file to write, which must not exist")
    args = parser.parse_args(argv)
    print(unpack_checkpoint(args.source, args.destination).table())
    return 0

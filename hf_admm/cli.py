"""The console script `hf-admm`."""

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from hf_admm.version import __version__


# Each command is a module that is imported only when it runs: torch and transformers take seconds.
COMMANDS = {
    "quickstart": "fine-tune a small model dense and sparse, offline on a CPU, and compare them",
    "glue": "fine-tune a model on a GLUE task to a sparsity pattern",
    "report": "write what a run logged, and where its zeros are, as one page with figures",
    "verify": "check that the weights of a checkpoint obey a sparsity pattern",
    "export": "export a checkpoint to ONNX, and check that every zero is kept",
    "speed": "time a 2:4 checkpoint dense against sparse on a GPU",
}

# Set before a command imports the libraries that read them; what the user has set stays.
ENVIRONMENT = {
    "quickstart": {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"},
    # Waiting threads that spin take the cores from those that work: where a CPU is shared, training crawls.
    "glue": {"OMP_WAIT_POLICY": "PASSIVE"},
}


def usage() -> str:
    """
    What `hf-admm --help` prints.

    Returns:
        `str`: The commands and what each is for.
    """
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name.ljust(width)}  {purpose}" for name, purpose in COMMANDS.items())
    return (
        "usage: hf-admm COMMAND [FLAGS]\n\nSparse fine-tuning for the Hugging Face Trainer.\n\n"
        f"commands:\n{commands}\n\nhf-admm COMMAND --help lists the flags of a command, hf-admm --version the version."
    )


def main(argv: Sequence[str] | None = None) -> int:
    """
    Runs a command.

    Args:
        argv (`Sequence[str]`, *optional*):
            The command and its flags. Defaults to those of the process.

    Returns:
        `int`: The exit code: that of the command, or 2 for bad input.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments[0] if arguments else None
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name == "--version":
        print(f"hf-admm {__version__}")
        return 0
    if name not in COMMANDS:
        complaint = "" if name is None else f"error: unknown command {name!r}\n\n"
        print(f"{complaint}{usage()}", file=sys.stderr)
        return 2
    for variable, value in ENVIRONMENT.get(name, {}).items():
        os.environ.setdefault(variable, value)
    try:
        return import_module(f"hf_admm.commands.{name}").main(arguments[1:])
    except (ValueError, OSError) as error:  # a file that can't be written, say
        print(f"error: {error}", file=sys.stderr)
        return 2

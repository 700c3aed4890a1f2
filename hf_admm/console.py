"""Who speaks: of all processes of a run the main one, and nobody in a quiet run. Imports nothing of this package."""

import logging
import os
import sys
from typing import TYPE_CHECKING

from transformers.utils import logging as transformers_logging


if TYPE_CHECKING:
    from transformers import TrainingArguments


def is_main_process() -> bool:
    """Whether this is the one process of a run that speaks, its rank 0. A run of one process is its own."""
    torch = sys.modules.get("torch")
    distributed = getattr(torch, "distributed", None)
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank() == 0
    return os.environ.get("RANK", "0") == "0"  # as launchers set it, before the processes have met


def get_logger(name: str) -> logging.Logger:
    """
    The logger of a module. What is below an error is said by the main process alone: the others would repeat it.

    Args:
        name (`str`):
            Name of the module.

    Returns:
        `logging.Logger`
    """
    logger = transformers_logging.get_logger(name)
    if _is_ours not in logger.filters:
        logger.addFilter(_is_ours)
    return logger


def _is_ours(record: logging.LogRecord) -> bool:
    """An error concerns the process that meets it, whichever it is."""
    return record.levelno >= logging.ERROR or is_main_process()


def is_quiet(args: "TrainingArguments") -> bool:
    """
    Whether a run should print nothing of itself. Warnings and errors are no part of that.

    Args:
        args ([`~transformers.TrainingArguments`]):
            Its arguments. `log_level="error"` and `"critical"` are quiet; `"passive"`, the default, is where
            `transformers.logging.set_verbosity_error()` was called.
    """
    return args.get_process_log_level() > logging.WARNING


def say(text: str, args: "TrainingArguments | None" = None) -> None:
    """
    Prints a text, in the main process, and not in a quiet run.

    Args:
        text (`str`):
            What to print.
        args ([`~transformers.TrainingArguments`], *optional*):
            The arguments of the run. Without them it is printed in any case.
    """
    if is_main_process() and (args is None or not is_quiet(args)):
        print(text, flush=True)

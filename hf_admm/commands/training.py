"""What the training commands do with their flags."""

from typing import Any

import datasets
from transformers.utils import logging

from hf_admm.commands.flags import CommandArguments
from hf_admm.console import say
from hf_admm.finetuning.tasks import TextTask
from hf_admm.finetuning.text_classification import FineTuning


def fine_tune(
    command: CommandArguments,
    arguments: dict[str, Any],
    task: TextTask,
    model_name_or_path: str,
    dense_baseline: bool,
    model_label: str | None = None,
) -> dict[str, Any] | None:
    """
    Runs the fine-tuning of a command, or shows what it would prune.

    Args:
        command ([`CommandArguments`]):
            The command's own flags.
        arguments (`dict[str, Any]`):
            What [`ADMMTrainingArguments`] is made from.
        task ([`TextTask`]):
            What to learn.
        model_name_or_path (`str`):
            The pre-trained model.
        dense_baseline (`bool`):
            Whether to train a dense model too.
        model_label (`str`, *optional*):
            What the record calls the model, if not by `model_name_or_path`.

    Returns:
        `dict[str, Any]`: The contents of `results.json`; `None` after a dry run.
    """
    if command.quiet:
        logging.set_verbosity_error()  # what loading a model says too
        logging.disable_progress_bar()
        datasets.disable_progress_bars()
    fine_tuning = FineTuning(
        task=task.limited(command.max_train_samples, command.max_eval_samples),
        model_name_or_path=model_name_or_path,
        arguments=arguments,
        max_seq_length=command.max_seq_length,
        model_label=model_label,
        quiet=command.quiet,
    )
    if command.dry_run:
        say(fine_tuning.target_table())
        return None
    return fine_tuning.run(dense_baseline=dense_baseline)

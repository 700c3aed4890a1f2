r"""Fine-tunes a model that finds answers in a text, on your own data, to a sparsity pattern.

    python examples/question_answering.py --model_name_or_path MODEL --output_dir out \
        --train_file train.jsonl --validation_file dev.jsonl

The files are JSON lines in the form of SQuAD, with empty lists where the text has no answer:
{"question": "Where?", "context": "Ada lives in London.", "answers": {"text": ["London"], "answer_start": [13]}}
"""

import re
import string
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset, load_dataset
from transformers import (
    AutoModelForQuestionAnswering,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    HfArgumentParser,
    set_seed,
)
from transformers.hf_argparser import HfArg

from hf_admm import ADMMTrainer, ADMMTrainingArguments, audit_checkpoint
from hf_admm.configs import apply_config


@dataclass
class ScriptArguments:
    model_name_or_path: str = HfArg(help="The pre-trained model: a folder, or its id on the hub.")
    train_file: str = HfArg(help="JSON lines to train on.")
    validation_file: str = HfArg(help="JSON lines to evaluate on.")
    max_seq_length: int = HfArg(default=384, help="Tokens of a question with one window of its text.")
    doc_stride: int = HfArg(default=128, help="Tokens that two windows of a long text share.")
    max_answer_length: int = HfArg(default=30, help="An answer has that many tokens at most.")
    config: str = HfArg(default="2_4", help="Recipe: a name from configs/ or a YAML file. Flags given here win.")


def read(path: str) -> Dataset:
    data = load_dataset("json", data_files=path, split="train")
    if missing := {"question", "context", "answers"} - set(data.column_names):
        raise ValueError(f"{path} has no column {', '.join(sorted(missing))}, but {', '.join(data.column_names)}.")
    return data


def span(answers: dict, offsets: list[tuple[int, int]], first: int) -> tuple[int, int]:
    """First and last token of the answer in a window, or the window's first token if it is not wholly there."""
    if not answers["text"]:
        return 0, 0
    start = answers["answer_start"][0]
    end = start + len(answers["text"][0])
    inside = [token for token, (left, right) in enumerate(offsets) if left < end and right > start]
    if not inside or offsets[inside[0]][0] > start or offsets[inside[-1]][1] < end:
        return 0, 0
    return first + inside[0], first + inside[-1]


def best_span(starts: np.ndarray, ends: np.ndarray, longest: int) -> tuple[float, int, int]:
    """The best score of a span of tokens, its first token and its last."""
    scores = starts[:, None] + ends[None, :]
    allowed = np.triu(np.ones_like(scores, dtype=bool)) & np.tril(np.ones_like(scores, dtype=bool), longest - 1)
    left, right = divmod(int(np.where(allowed, scores, -np.inf).argmax()), len(ends))
    return float(scores[left, right]), left, right


def words(text: str) -> list[str]:
    """What SQuAD compares: lower case, without punctuation and articles."""
    return re.sub(r"\b(a|an|the)\b", " ", "".join(c for c in text.lower() if c not in string.punctuation)).split()


def f1(predicted: list[str], true: list[str]) -> float:
    common = sum((Counter(predicted) & Counter(true)).values())
    return 2 * common / (len(predicted) + len(true)) if predicted and true else float(predicted == true)


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = HfArgumentParser((ScriptArguments, ADMMTrainingArguments))
    apply_config(parser, parser.parse_known_args(argv)[0].config)
    script, args = parser.parse_args_into_dataclasses(argv)
    set_seed(args.seed)

    train, validation = read(script.train_file), read(script.validation_file)
    tokenizer = AutoTokenizer.from_pretrained(script.model_name_or_path)
    # Half precision would lose small updates; --bf16 computes in it and keeps the weights in float32.
    model = AutoModelForQuestionAnswering.from_pretrained(script.model_name_or_path, dtype=torch.float32)

    def encode(batch, rows):
        inputs = tokenizer(
            batch["question"],
            batch["context"],
            truncation="only_second",
            max_length=script.max_seq_length,
            stride=script.doc_stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        windows = {"row": [], "first": [], "offsets": [], "start_positions": [], "end_positions": []}
        for window, sample in enumerate(inputs.pop("overflow_to_sample_mapping")):
            context = [token for token, part in enumerate(inputs.sequence_ids(window)) if part == 1]
            offsets = [inputs["offset_mapping"][window][token] for token in context]
            start, end = span(batch["answers"][sample], offsets, context[0])
            for name, value in zip(windows, (rows[sample], context[0], offsets, start, end), strict=True):
                windows[name].append(value)
        inputs.pop("offset_mapping")
        return {**inputs, **windows}

    with args.main_process_first(desc="tokenizing"):
        train_windows, windows = (
            data.map(encode, batched=True, with_indices=True, remove_columns=data.column_names)
            for data in (train, validation)
        )
    may_be_empty = any(not answers["text"] for answers in [*train["answers"], *validation["answers"]])

    def score(prediction: EvalPrediction) -> dict[str, float]:
        best, empty = {}, {}
        for window, starts, ends in zip(windows, *prediction.predictions[:2], strict=True):
            row, context = window["row"], slice(window["first"], window["first"] + len(window["offsets"]))
            found, left, right = best_span(starts[context], ends[context], script.max_answer_length)
            text = validation[row]["context"][window["offsets"][left][0] : window["offsets"][right][1]]
            best[row] = max(best.get(row, (-np.inf, "")), (found, text))
            empty[row] = min(empty.get(row, np.inf), float(starts[0] + ends[0]))
        exact, overlap = [], []
        for row, answers in enumerate(validation["answers"]):
            predicted = words("" if may_be_empty and empty[row] > best[row][0] else best[row][1])
            accepted = [words(answer) for answer in answers["text"] or [""]]
            exact.append(predicted in accepted)
            overlap.append(max(f1(predicted, answer) for answer in accepted))
        return {"exact_match": 100 * float(np.mean(exact)), "f1": 100 * float(np.mean(overlap))}

    trainer = ADMMTrainer(
        model=model,
        args=args,
        train_dataset=train_windows,
        eval_dataset=windows,
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=score,
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
    if args.is_sparse and trainer.is_world_process_zero():
        print(f"{args.output_dir}: {audit_checkpoint(args.output_dir).verdict()}")
    return metrics


if __name__ == "__main__":
    main()

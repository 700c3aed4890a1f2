r"""Fine-tunes a token classifier (named entities, parts of speech) on your own data, to a sparsity pattern.

    pip install hf-admm[examples]
    python examples/token_classification.py --model_name_or_path MODEL --output_dir out \
        --train_file train.jsonl --validation_file dev.jsonl

The files are JSON lines: {"tokens": ["Ada", "lives", "in", "London"], "tags": ["B-PER", "O", "O", "B-LOC"]}
"""

from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset, load_dataset
from seqeval.metrics import accuracy_score, f1_score, precision_score, recall_score
from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    EvalPrediction,
    HfArgumentParser,
    set_seed,
)
from transformers.hf_argparser import HfArg

from hf_admm import ADMMTrainer, ADMMTrainingArguments, audit_checkpoint
from hf_admm.configs import apply_config


IGNORED = -100  # no loss and no score: special tokens, and all of a word but its first piece


@dataclass
class ScriptArguments:
    model_name_or_path: str = HfArg(help="The pre-trained model: a folder, or its id on the hub.")
    train_file: str = HfArg(help="JSON lines to train on.")
    validation_file: str = HfArg(help="JSON lines to evaluate on.")
    tokens_column: str = HfArg(default="tokens", help="Column of the words, a list in each row.")
    tags_column: str = HfArg(default="tags", help="Column of the words' tags, a list of names in each row.")
    max_seq_length: int = HfArg(default=128, help="Truncate longer inputs to that many tokens.")
    config: str = HfArg(default="2_4", help="Recipe: a name from configs/ or a YAML file. Flags given here win.")


def read(path: str, columns: list[str]) -> Dataset:
    data = load_dataset("json", data_files=path, split="train")
    if missing := set(columns) - set(data.column_names):
        raise ValueError(
            f"{path} has no column {', '.join(sorted(missing))}, but {', '.join(data.column_names)}. Name yours with "
            "--tokens_column and --tags_column."
        )
    return data


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = HfArgumentParser((ScriptArguments, ADMMTrainingArguments))
    apply_config(parser, parser.parse_known_args(argv)[0].config)
    script, args = parser.parse_args_into_dataclasses(argv)
    set_seed(args.seed)

    columns = [script.tokens_column, script.tags_column]
    train, validation = (read(file, columns) for file in (script.train_file, script.validation_file))
    names = sorted({str(tag) for tags in train[script.tags_column] for tag in tags})
    if unknown := {str(tag) for tags in validation[script.tags_column] for tag in tags} - set(names):
        raise ValueError(f"{script.validation_file} has tags that {script.train_file} has not: {sorted(unknown)}.")
    classes = {name: number for number, name in enumerate(names)}

    tokenizer = AutoTokenizer.from_pretrained(script.model_name_or_path)
    model = AutoModelForTokenClassification.from_pretrained(
        script.model_name_or_path,
        num_labels=len(names),
        id2label=dict(enumerate(names)),
        label2id=classes,
        dtype=torch.float32,  # half precision would lose small updates; --bf16 computes in it and keeps the weights
    )

    def encode(batch):
        inputs = tokenizer(
            batch[script.tokens_column], is_split_into_words=True, truncation=True, max_length=script.max_seq_length
        )
        inputs["labels"] = []
        for row, tags in enumerate(batch[script.tags_column]):
            words = inputs.word_ids(row)
            first = [word is not None and word not in words[:place] for place, word in enumerate(words)]
            inputs["labels"].append(
                [classes[str(tags[word])] if new else IGNORED for word, new in zip(words, first, strict=True)]
            )
        return inputs

    def score(prediction: EvalPrediction) -> dict[str, float]:
        predicted, true = [], []
        for row, labels in zip(np.argmax(prediction.predictions, axis=-1), prediction.label_ids, strict=True):
            predicted.append([names[number] for number in row[labels != IGNORED]])
            true.append([names[number] for number in labels[labels != IGNORED]])
        return {
            "precision": precision_score(true, predicted, zero_division=0),
            "recall": recall_score(true, predicted, zero_division=0),
            "f1": f1_score(true, predicted, zero_division=0),
            "accuracy": accuracy_score(true, predicted),
        }

    with args.main_process_first(desc="tokenizing"):
        train, validation = (
            data.map(encode, batched=True, remove_columns=data.column_names) for data in (train, validation)
        )

    trainer = ADMMTrainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
        data_collator=DataCollatorForTokenClassification(tokenizer),
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

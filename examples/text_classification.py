r"""Fine-tunes a text classifier on your own data, to a sparsity pattern.

    python examples/text_classification.py --model_name_or_path MODEL --output_dir out \
        --train_file train.csv --validation_file dev.csv

The files are CSV or JSON lines with a column of texts and one of labels (names or numbers). For pairs of texts, name
the column of the second ones by --pair_column.
"""

from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset, load_dataset
from sklearn.metrics import accuracy_score, f1_score
from transformers import (
    AutoModelForSequenceClassification,
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
    train_file: str = HfArg(help="CSV or JSON lines to train on.")
    validation_file: str = HfArg(help="CSV or JSON lines to evaluate on.")
    text_column: str = HfArg(default="text", help="Column of the texts.")
    pair_column: str | None = HfArg(default=None, help="Column of the second texts, if rows are pairs.")
    label_column: str = HfArg(default="label", help="Column of the labels.")
    max_seq_length: int = HfArg(default=128, help="Truncate longer inputs to that many tokens.")
    config: str = HfArg(default="2_4", help="Recipe: a name from configs/ or a YAML file. Flags given here win.")


def read(path: str, columns: list[str]) -> Dataset:
    data = load_dataset("csv" if path.endswith(".csv") else "json", data_files=path, split="train")
    if missing := set(columns) - set(data.column_names):
        raise ValueError(
            f"{path} has no column {', '.join(sorted(missing))}, but {', '.join(data.column_names)}. Name yours with "
            "--text_column, --pair_column and --label_column."
        )
    if empty := [row for row, cells in enumerate(data.select_columns(columns)) if None in cells.values()]:
        raise ValueError(f"{path} has empty cells in the rows {empty[:10]}, {len(empty)} in all, the first being 0.")
    return data


def score(prediction: EvalPrediction) -> dict[str, float]:
    classes = np.argmax(prediction.predictions, axis=-1)
    return {
        "accuracy": accuracy_score(prediction.label_ids, classes),
        "f1": f1_score(prediction.label_ids, classes, average="macro"),
    }


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = HfArgumentParser((ScriptArguments, ADMMTrainingArguments))
    apply_config(parser, parser.parse_known_args(argv)[0].config)
    script, args = parser.parse_args_into_dataclasses(argv)
    set_seed(args.seed)

    texts = [column for column in (script.text_column, script.pair_column) if column]
    train, validation = (
        read(file, [*texts, script.label_column]) for file in (script.train_file, script.validation_file)
    )
    names = sorted({str(label) for label in train[script.label_column]})
    if unknown := {str(label) for label in validation[script.label_column]} - set(names):
        raise ValueError(f"{script.validation_file} has labels that {script.train_file} has not: {sorted(unknown)}.")
    classes = {name: number for number, name in enumerate(names)}

    tokenizer = AutoTokenizer.from_pretrained(script.model_name_or_path)
    model = AutoModelForSequenceClassification.from_pretrained(
        script.model_name_or_path,
        num_labels=len(names),
        id2label=dict(enumerate(names)),
        label2id=classes,
        dtype=torch.float32,  # half precision would lose small updates; --bf16 computes in it and keeps the weights
    )
    if tokenizer.pad_token is None:  # decoders such as GPT-2
        tokenizer.pad_token = tokenizer.eos_token
        model.config.pad_token_id = tokenizer.pad_token_id

    def encode(batch):
        inputs = tokenizer(*(batch[column] for column in texts), truncation=True, max_length=script.max_seq_length)
        return {**inputs, "labels": [classes[str(label)] for label in batch[script.label_column]]}

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

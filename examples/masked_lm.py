r"""Goes on training a masked language model on your own texts, to a sparsity pattern.

    python examples/masked_lm.py --model_name_or_path MODEL --output_dir out \
        --train_file train.txt --validation_file dev.txt

The files are plain text (.txt, a text in each line), CSV or JSON lines with a column of texts.
"""

import math
from dataclasses import dataclass

import torch
from datasets import Dataset, load_dataset
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
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
    train_file: str = HfArg(help="Text, CSV or JSON lines to train on.")
    validation_file: str = HfArg(help="Text, CSV or JSON lines to evaluate on.")
    text_column: str = HfArg(default="text", help="Column of the texts.")
    max_seq_length: int = HfArg(default=128, help="Truncate longer texts to that many tokens.")
    mlm_probability: float = HfArg(default=0.15, help="Share of the tokens to guess.")
    config: str = HfArg(default="2_4", help="Recipe: a name from configs/ or a YAML file. Flags given here win.")


def read(path: str, column: str) -> Dataset:
    kind = {"txt": "text", "csv": "csv"}.get(path.rsplit(".", 1)[-1], "json")
    data = load_dataset(kind, data_files=path, split="train")
    if column not in data.column_names:
        raise ValueError(f"{path} has no column {column}, but {', '.join(data.column_names)}: --text_column names it.")
    return data.select_columns(column).filter(lambda row: bool(row[column]))


def guesses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """What is kept of the logits for the accuracy: a number a token, and not one for each word of the vocabulary."""
    return logits.argmax(dim=-1)


def score(prediction: EvalPrediction) -> dict[str, float]:
    asked = prediction.label_ids != -100
    return {"accuracy": float((prediction.predictions == prediction.label_ids)[asked].mean())}


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = HfArgumentParser((ScriptArguments, ADMMTrainingArguments))
    apply_config(parser, parser.parse_known_args(argv)[0].config)
    script, args = parser.parse_args_into_dataclasses(argv)
    set_seed(args.seed)

    tokenizer = AutoTokenizer.from_pretrained(script.model_name_or_path)
    # Half precision would lose small updates; --bf16 computes in it and keeps the weights in float32.
    model = AutoModelForMaskedLM.from_pretrained(script.model_name_or_path, dtype=torch.float32)

    def encode(batch):
        return tokenizer(
            batch[script.text_column],
            truncation=True,
            max_length=script.max_seq_length,
            return_special_tokens_mask=True,
        )

    with args.main_process_first(desc="tokenizing"):
        train, validation = (
            read(file, script.text_column).map(encode, batched=True, remove_columns=script.text_column)
            for file in (script.train_file, script.validation_file)
        )

    trainer = ADMMTrainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm_probability=script.mlm_probability),
        compute_metrics=score,
        preprocess_logits_for_metrics=guesses,
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    metrics = trainer.evaluate()  # of tokens that are drawn anew each time
    metrics["eval_perplexity"] = math.exp(metrics["eval_loss"])
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
    if args.is_sparse and trainer.is_world_process_zero():
        print(f"{args.output_dir}: {audit_checkpoint(args.output_dir).verdict()}")
    return metrics


if __name__ == "__main__":
    main()

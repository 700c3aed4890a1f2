r"""Goes on training a causal language model on your own texts, to a sparsity pattern.

    python examples/causal_lm.py --model_name_or_path MODEL --output_dir out --train_file train.txt \
        --validation_file dev.txt --learning_rate 2e-5 --per_device_train_batch_size 4

The files are plain text (.txt, a text in each line), CSV or JSON lines with a column of texts.
"""

import math
from dataclasses import dataclass
from itertools import chain

import torch
from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, default_data_collator, set_seed
from transformers.hf_argparser import HfArg

from hf_admm import ADMMTrainer, ADMMTrainingArguments, audit_checkpoint
from hf_admm.configs import apply_config


@dataclass
class ScriptArguments:
    model_name_or_path: str = HfArg(help="The pre-trained model: a folder, or its id on the hub.")
    train_file: str = HfArg(help="Text, CSV or JSON lines to train on.")
    validation_file: str = HfArg(help="Text, CSV or JSON lines to evaluate on.")
    text_column: str = HfArg(default="text", help="Column of the texts.")
    block_size: int = HfArg(default=512, help="Texts are joined and cut into blocks of that many tokens.")
    config: str = HfArg(default="2_4", help="Recipe: a name from configs/ or a YAML file. Flags given here win.")


def read(path: str, column: str) -> Dataset:
    kind = {"txt": "text", "csv": "csv"}.get(path.rsplit(".", 1)[-1], "json")
    data = load_dataset(kind, data_files=path, split="train")
    if column not in data.column_names:
        raise ValueError(f"{path} has no column {column}, but {', '.join(data.column_names)}: --text_column names it.")
    return data.select_columns(column)


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = HfArgumentParser((ScriptArguments, ADMMTrainingArguments))
    apply_config(parser, parser.parse_known_args(argv)[0].config)
    script, args = parser.parse_args_into_dataclasses(argv)
    set_seed(args.seed)

    tokenizer = AutoTokenizer.from_pretrained(script.model_name_or_path)
    # Half precision would lose small updates; --bf16 computes in it and keeps the weights in float32.
    model = AutoModelForCausalLM.from_pretrained(script.model_name_or_path, dtype=torch.float32)

    def blocks(batch):
        """The texts in one row, each with its end, cut into blocks; what is left over at the end is dropped."""
        texts = tokenizer([text for text in batch[script.text_column] if text], add_special_tokens=False)["input_ids"]
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        tokens = list(chain.from_iterable(text + end for text in texts))
        starts = range(0, len(tokens) - script.block_size + 1, script.block_size)
        cut = [tokens[start : start + script.block_size] for start in starts]
        return {"input_ids": cut, "labels": cut}

    files = (script.train_file, script.validation_file)
    with args.main_process_first(desc="tokenizing"):
        train, validation = (
            read(file, script.text_column).map(blocks, batched=True, remove_columns=script.text_column)
            for file in files
        )
    if short := [file for file, data in zip(files, (train, validation), strict=True) if not len(data)]:
        raise ValueError(f"Less than one block of {script.block_size} tokens in {short}: lower --block_size.")

    trainer = ADMMTrainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
        data_collator=default_data_collator,
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    metrics = trainer.evaluate()
    metrics["eval_perplexity"] = math.exp(metrics["eval_loss"])
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
    if args.is_sparse and trainer.is_world_process_zero():
        print(f"{args.output_dir}: {audit_checkpoint(args.output_dir).verdict()}")
    return metrics


if __name__ == "__main__":
    main()

r"""Fine-tunes an encoder-decoder to summarise, on your own data, to a sparsity pattern.

    pip install hf-admm[examples]
    python examples/summarization.py --model_name_or_path MODEL --output_dir out --train_file train.csv \
        --validation_file dev.csv --source_prefix "summarize: "

The files are CSV or JSON lines with a column of documents and one of summaries.
"""

from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset, load_dataset
from rouge_score.rouge_scorer import RougeScorer
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    EvalPrediction,
    HfArgumentParser,
    set_seed,
)
from transformers.hf_argparser import HfArg

from hf_admm import audit_checkpoint
from hf_admm.configs import apply_config
from hf_admm.integrations import ADMMSeq2SeqTrainer, ADMMSeq2SeqTrainingArguments


@dataclass
class ScriptArguments:
    model_name_or_path: str = HfArg(help="The pre-trained model: a folder, or its id on the hub.")
    train_file: str = HfArg(help="CSV or JSON lines to train on.")
    validation_file: str = HfArg(help="CSV or JSON lines to evaluate on.")
    text_column: str = HfArg(default="document", help="Column of the documents.")
    summary_column: str = HfArg(default="summary", help="Column of the summaries.")
    source_prefix: str = HfArg(default="", help="What stands before each document; T5 wants 'summarize: '.")
    max_source_length: int = HfArg(default=512, help="Truncate longer documents to that many tokens.")
    max_target_length: int = HfArg(default=128, help="Truncate longer summaries, also what is generated.")
    config: str = HfArg(default="2_4", help="Recipe: a name from configs/ or a YAML file. Flags given here win.")


def read(path: str, columns: list[str]) -> Dataset:
    data = load_dataset("csv" if path.endswith(".csv") else "json", data_files=path, split="train")
    if missing := set(columns) - set(data.column_names):
        raise ValueError(
            f"{path} has no column {', '.join(sorted(missing))}, but {', '.join(data.column_names)}. Name yours with "
            "--text_column and --summary_column."
        )
    return data


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = HfArgumentParser((ScriptArguments, ADMMSeq2SeqTrainingArguments))
    parser.set_defaults(predict_with_generate=True)
    apply_config(parser, parser.parse_known_args(argv)[0].config)
    script, args = parser.parse_args_into_dataclasses(argv)
    args.generation_max_length = args.generation_max_length or script.max_target_length
    set_seed(args.seed)

    tokenizer = AutoTokenizer.from_pretrained(script.model_name_or_path)
    # Half precision would lose small updates; --bf16 computes in it and keeps the weights in float32.
    model = AutoModelForSeq2SeqLM.from_pretrained(script.model_name_or_path, dtype=torch.float32)

    def encode(batch):
        documents = [script.source_prefix + text for text in batch[script.text_column]]
        inputs = tokenizer(documents, truncation=True, max_length=script.max_source_length)
        summaries = tokenizer(
            text_target=batch[script.summary_column], truncation=True, max_length=script.max_target_length
        )
        return {**inputs, "labels": summaries["input_ids"]}

    columns = [script.text_column, script.summary_column]
    with args.main_process_first(desc="tokenizing"):
        train, validation = (
            data.map(encode, batched=True, remove_columns=data.column_names)
            for data in (read(file, columns) for file in (script.train_file, script.validation_file))
        )

    rouge = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)

    def score(prediction: EvalPrediction) -> dict[str, float]:
        generated, references = (
            tokenizer.batch_decode(np.where(tokens < 0, tokenizer.pad_token_id, tokens), skip_special_tokens=True)
            for tokens in (prediction.predictions, prediction.label_ids)
        )
        scores = [rouge.score(true, guess) for true, guess in zip(references, generated, strict=True)]
        return {name: 100 * float(np.mean([row[name].fmeasure for row in scores])) for name in scores[0]}

    trainer = ADMMSeq2SeqTrainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        compute_metrics=score if args.predict_with_generate else None,
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

r"""Fine-tunes a text classifier that is sparse already on your own data, without losing one of its zeros.

    python examples/own_mask.py --base SPARSE_MODEL --output_dir out --train_file train.csv --validation_file dev.csv

SPARSE_MODEL is a folder, or an id on the hub, of any pruned checkpoint: by SparseGPT, Wanda, ASP, llm-compressor, by
magnitude. The files are CSV or JSON lines with the columns "text" and "label". With --lora_rank 8 the base stays
frozen, adapters are trained (pip install peft), and merged under the base's mask at the end.
"""

from dataclasses import dataclass

import numpy as np
from datasets import load_dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    set_seed,
)
from transformers.hf_argparser import HfArg

from hf_admm import ADMMTrainer, ADMMTrainingArguments, audit_checkpoint, merge_sparse_adapter


@dataclass
class ScriptArguments:
    base: str = HfArg(help="The sparse model: a folder, or its id on the hub.")
    train_file: str = HfArg(help="CSV or JSON lines to train on.")
    validation_file: str = HfArg(help="CSV or JSON lines to evaluate on.")
    max_seq_length: int = HfArg(default=128, help="Truncate longer inputs to that many tokens.")
    lora_rank: int = HfArg(default=0, help="Rank of LoRA adapters on all linear layers; 0 trains the weights.")


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = HfArgumentParser((ScriptArguments, ADMMTrainingArguments))
    parser.set_defaults(sparsity_pattern="own")
    script, args = parser.parse_args_into_dataclasses(argv)
    set_seed(args.seed)

    kind = "csv" if script.train_file.endswith(".csv") else "json"
    data = load_dataset(kind, data_files={"train": script.train_file, "validation": script.validation_file})
    names = sorted({str(label) for label in data["train"]["label"]})

    tokenizer = AutoTokenizer.from_pretrained(script.base)
    model = AutoModelForSequenceClassification.from_pretrained(script.base, num_labels=len(names))
    if script.lora_rank:
        from peft import LoraConfig, get_peft_model

        rank = script.lora_rank
        config = LoraConfig(task_type="SEQ_CLS", r=rank, lora_alpha=2 * rank, target_modules="all-linear")
        model = get_peft_model(model, config)

    def encode(batch):
        inputs = tokenizer(batch["text"], truncation=True, max_length=script.max_seq_length)
        return {**inputs, "labels": [names.index(str(label)) for label in batch["label"]]}

    data = data.map(encode, batched=True, remove_columns=data["train"].column_names)
    trainer = ADMMTrainer(
        model=model,
        args=args,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda found: {"accuracy": float(np.mean(found.predictions.argmax(-1) == found.label_ids))},
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    metrics = trainer.evaluate()
    print(f"accuracy {metrics['eval_accuracy']:.4f}")

    folder = f"{args.output_dir}/model"
    if script.lora_rank:
        merged = merge_sparse_adapter(trainer.model)
        merged.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        trainer.model = trainer.model_wrapped = merged
        print(f"accuracy once merged {trainer.evaluate()['eval_accuracy']:.4f}")
    else:
        trainer.save_model(folder)
    print(f"{folder}: {audit_checkpoint(folder, against=script.base).verdict()}")
    return metrics


if __name__ == "__main__":
    main()

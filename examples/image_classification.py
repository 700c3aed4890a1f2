r"""Fine-tunes an image classifier on your own pictures, to a sparsity pattern.

    pip install hf-admm[examples]
    python examples/image_classification.py --model_name_or_path MODEL --output_dir out \
        --train_dir pictures/train --validation_dir pictures/dev

Each folder holds one folder for each class, named after it, with its pictures.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import load_dataset
from sklearn.metrics import accuracy_score, f1_score
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    EvalPrediction,
    HfArgumentParser,
    default_data_collator,
    set_seed,
)
from transformers.hf_argparser import HfArg

from hf_admm import ADMMTrainer, ADMMTrainingArguments, audit_checkpoint
from hf_admm.configs import apply_config


@dataclass
class ScriptArguments:
    model_name_or_path: str = HfArg(help="The pre-trained model: a folder, or its id on the hub.")
    train_dir: str = HfArg(help="Folder of folders of pictures to train on.")
    validation_dir: str = HfArg(help="Folder of folders of pictures to evaluate on.")
    config: str = HfArg(default="2_4", help="Recipe: a name from configs/ or a YAML file. Flags given here win.")


def score(prediction: EvalPrediction) -> dict[str, float]:
    classes = np.argmax(prediction.predictions, axis=-1)
    return {
        "accuracy": accuracy_score(prediction.label_ids, classes),
        "f1": f1_score(prediction.label_ids, classes, average="macro"),
    }


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = HfArgumentParser((ScriptArguments, ADMMTrainingArguments))
    parser.set_defaults(remove_unused_columns=False)  # the pictures are such a column, until they are drawn
    apply_config(parser, parser.parse_known_args(argv)[0].config)
    script, args = parser.parse_args_into_dataclasses(argv)
    set_seed(args.seed)

    if empty := [folder for folder in (script.train_dir, script.validation_dir) if not any(Path(folder).glob("*/*"))]:
        raise ValueError(f"No pictures in {', '.join(empty)}: each class has a folder there, with its pictures in it.")
    files = {"train": f"{script.train_dir}/**", "validation": f"{script.validation_dir}/**"}
    data = load_dataset("imagefolder", data_files=files, drop_labels=False)
    names = data["train"].features["label"].names
    processor = AutoImageProcessor.from_pretrained(script.model_name_or_path)
    model = AutoModelForImageClassification.from_pretrained(
        script.model_name_or_path,
        num_labels=len(names),
        id2label=dict(enumerate(names)),
        label2id={name: number for number, name in enumerate(names)},
        ignore_mismatched_sizes=True,  # the head of a model that was fine-tuned on other classes
        dtype=torch.float32,  # half precision would lose small updates; --bf16 computes in it and keeps the weights
    )

    def encode(batch):
        """Pictures as they are drawn. Whatever changes those to train on at random (crops, flips) goes here."""
        pictures = processor([picture.convert("RGB") for picture in batch["image"]], return_tensors="pt")
        return {"pixel_values": pictures["pixel_values"], "labels": batch["label"]}

    data = data.with_transform(encode)
    trainer = ADMMTrainer(
        model=model,
        args=args,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        processing_class=processor,
        data_collator=default_data_collator,
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

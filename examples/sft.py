r"""Supervised fine-tuning of a small chat model by TRL, on your own conversations, to a sparsity pattern.

    pip install trl
    python examples/sft.py --model_name_or_path MODEL --output_dir out --train_file train.jsonl \
        --validation_file dev.jsonl --learning_rate 2e-5 --per_device_train_batch_size 4

The files are JSON lines in one of TRL's forms:
{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}
{"prompt": "The capital of France is", "completion": " Paris."}
{"text": "Any text."}

Every flag of SFTConfig goes: --assistant_only_loss, --packing, --max_length. On a CPU add --bf16 false.
"""

from dataclasses import dataclass

import torch
from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, set_seed
from transformers.hf_argparser import HfArg

from hf_admm import audit_checkpoint
from hf_admm.configs import apply_config
from hf_admm.integrations import ADMMSFTConfig, ADMMSFTTrainer


FORMS = ({"messages"}, {"prompt", "completion"}, {"text"})


@dataclass
class ScriptArguments:
    model_name_or_path: str = HfArg(help="The pre-trained model: a folder, or its id on the hub.")
    train_file: str = HfArg(help="JSON lines to train on.")
    validation_file: str = HfArg(help="JSON lines to evaluate on.")
    config: str = HfArg(default="2_4", help="Recipe: a name from configs/ or a YAML file. Flags given here win.")


def read(path: str) -> Dataset:
    data = load_dataset("json", data_files=path, split="train")
    if not any(form <= set(data.column_names) for form in FORMS):
        raise ValueError(
            f"{path} has the columns {', '.join(data.column_names)}, but SFT wants messages, prompt and completion, "
            "or text."
        )
    return data


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = HfArgumentParser((ScriptArguments, ADMMSFTConfig))
    apply_config(parser, parser.parse_known_args(argv)[0].config)
    script, args = parser.parse_args_into_dataclasses(argv)
    set_seed(args.seed)

    trainer = ADMMSFTTrainer(
        # Half precision would lose small updates; --bf16 computes in it and keeps the weights in float32.
        model=AutoModelForCausalLM.from_pretrained(script.model_name_or_path, dtype=torch.float32),
        args=args,
        train_dataset=read(script.train_file),
        eval_dataset=read(script.validation_file),
        processing_class=AutoTokenizer.from_pretrained(script.model_name_or_path),
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

r"""Fine-tunes a sentence-embedding model by Sentence Transformers, on your own pairs, to a sparsity pattern.

    pip install sentence-transformers
    python examples/embeddings.py --model_name_or_path MODEL --output_dir out \
        --train_file train.csv --validation_file dev.csv

The files are CSV or JSON lines with two columns of texts that belong together, such as a question and its answer: each
learns to find the other among those of its batch, so larger batches teach more.
"""

from dataclasses import dataclass

from datasets import Dataset, load_dataset
from sentence_transformers import (
    SentenceTransformer,
)
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from transformers import HfArgumentParser, set_seed
from transformers.hf_argparser import HfArg

from hf_admm import audit_checkpoint
from hf_admm.configs import apply_config
from hf_admm.integrations import ADMMSentenceTransformerTrainer, ADMMSentenceTransformerTrainingArguments


@dataclass
class ScriptArguments:
    model_name_or_path: str = HfArg(help="The pre-trained model: a folder, or its id on the hub.")
    train_file: str = HfArg(help="CSV or JSON lines to train on.")
    validation_file: str = HfArg(help="CSV or JSON lines to evaluate on.")
    anchor_column: str = HfArg(default="anchor", help="Column of the texts to search with.")
    positive_column: str = HfArg(default="positive", help="Column of the texts to find.")
    max_seq_length: int = HfArg(default=128, help="Truncate longer texts to that many tokens.")
    config: str = HfArg(default="2_4", help="Recipe: a name from configs/ or a YAML file. Flags given here win.")


def read(path: str, columns: list[str]) -> Dataset:
    data = load_dataset("csv" if path.endswith(".csv") else "json", data_files=path, split="train")
    if missing := set(columns) - set(data.column_names):
        raise ValueError(
            f"{path} has no column {', '.join(sorted(missing))}, but {', '.join(data.column_names)}. Name yours with "
            "--anchor_column and --positive_column."
        )
    return data.select_columns(columns)


def search(anchors: list[str], positives: list[str]) -> InformationRetrievalEvaluator:
    """How well each anchor finds its own text among those of all; the same text twice is one text."""
    names = {text: str(number) for number, text in enumerate(dict.fromkeys(positives))}
    relevant = {}
    for anchor, positive in zip(anchors, positives, strict=True):
        relevant.setdefault(anchor, set()).add(names[positive])
    queries = {str(number): anchor for number, anchor in enumerate(relevant)}
    return InformationRetrievalEvaluator(
        queries=queries,
        corpus={name: text for text, name in names.items()},
        relevant_docs={number: relevant[anchor] for number, anchor in queries.items()},
    )


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = HfArgumentParser((ScriptArguments, ADMMSentenceTransformerTrainingArguments))
    apply_config(parser, parser.parse_known_args(argv)[0].config)
    script, args = parser.parse_args_into_dataclasses(argv)
    set_seed(args.seed)

    columns = [script.anchor_column, script.positive_column]
    train, validation = (read(file, columns) for file in (script.train_file, script.validation_file))
    # Half precision would lose small updates; --bf16 computes in it and keeps the weights in float32.
    model = SentenceTransformer(script.model_name_or_path, model_kwargs={"dtype": "float32"}, device=str(args.device))
    model.max_seq_length = script.max_seq_length

    trainer = ADMMSentenceTransformerTrainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=validation,
        loss=MultipleNegativesRankingLoss(model),
        evaluator=search(*(list(validation[column]) for column in columns)),
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

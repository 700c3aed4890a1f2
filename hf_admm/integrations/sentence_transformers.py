"""The trainers of Sentence Transformers (https://sbert.net)."""

from dataclasses import dataclass

from sentence_transformers import (
    CrossEncoderTrainer,
    CrossEncoderTrainingArguments,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)

from hf_admm.arguments import ADMMArgumentsMixin
from hf_admm.trainer import ADMMTrainerMixin


@dataclass
class ADMMSentenceTransformerTrainingArguments(ADMMArgumentsMixin, SentenceTransformerTrainingArguments):
    """[`~sentence_transformers.SentenceTransformerTrainingArguments`] with the flags of [`ADMMArgumentsMixin`]."""


class ADMMSentenceTransformerTrainer(ADMMTrainerMixin, SentenceTransformerTrainer):
    """
    [`~sentence_transformers.SentenceTransformerTrainer`] that fine-tunes an embedding model to a sparsity pattern.
    Takes what it takes, with [`ADMMSentenceTransformerTrainingArguments`] as `args`.
    """

    training_args_class = ADMMSentenceTransformerTrainingArguments


@dataclass
class ADMMCrossEncoderTrainingArguments(ADMMArgumentsMixin, CrossEncoderTrainingArguments):
    """[`~sentence_transformers.CrossEncoderTrainingArguments`] with the flags of [`ADMMArgumentsMixin`]."""


class ADMMCrossEncoderTrainer(ADMMTrainerMixin, CrossEncoderTrainer):
    """
    [`~sentence_transformers.CrossEncoderTrainer`] that fine-tunes a re-ranker to a sparsity pattern. Takes what it
    takes, with [`ADMMCrossEncoderTrainingArguments`] as `args`.
    """

    training_args_class = ADMMCrossEncoderTrainingArguments

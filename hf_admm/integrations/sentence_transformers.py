"""The trainers of Sentence Transformers (https://sbert.net)."""

from dataclasses import dataclass

from sentence_transformers import (
    CrossEncoderTrainer,
    CrossEncoderTrainingArguments,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)

from hf_admm.arguments import ADMMArgumentsMixin
from hf_admm.checkpoints.sidecar import SHARDED_SIDECAR_NAME, SIDECAR_NAME
from hf_admm.trainer import ADMMTrainerMixin


class _KeepsSidecars:
    """
    With every checkpoint that goes to the hub, Sentence Transformers uploads what else lies in its folder. Dense
    weights are no part of a model; `hub_strategy="checkpoint"` uploads them with all that a resume needs.
    """

    def _checkpoint_push_skip_names(self, checkpoint_folder: str) -> set[str]:
        return super()._checkpoint_push_skip_names(checkpoint_folder) | {SIDECAR_NAME, SHARDED_SIDECAR_NAME}


@dataclass
class ADMMSentenceTransformerTrainingArguments(ADMMArgumentsMixin, SentenceTransformerTrainingArguments):
    """[`~sentence_transformers.SentenceTransformerTrainingArguments`] with the flags of [`ADMMArgumentsMixin`]."""


class ADMMSentenceTransformerTrainer(_KeepsSidecars, ADMMTrainerMixin, SentenceTransformerTrainer):
    """
    [`~sentence_transformers.SentenceTransformerTrainer`] that fine-tunes an embedding model to a sparsity pattern.
    Takes what it takes, with [`ADMMSentenceTransformerTrainingArguments`] as `args`.
    """

    training_args_class = ADMMSentenceTransformerTrainingArguments


@dataclass
class ADMMCrossEncoderTrainingArguments(ADMMArgumentsMixin, CrossEncoderTrainingArguments):
    """[`~sentence_transformers.CrossEncoderTrainingArguments`] with the flags of [`ADMMArgumentsMixin`]."""


class ADMMCrossEncoderTrainer(_KeepsSidecars, ADMMTrainerMixin, CrossEncoderTrainer):
    """
    [`~sentence_transformers.CrossEncoderTrainer`] that fine-tunes a re-ranker to a sparsity pattern. Takes what it
    takes, with [`ADMMCrossEncoderTrainingArguments`] as `args`.
    """

    training_args_class = ADMMCrossEncoderTrainingArguments

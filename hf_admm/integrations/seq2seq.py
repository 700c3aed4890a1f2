"""[`~transformers.Seq2SeqTrainer`], whose evaluations may generate."""

from dataclasses import dataclass

from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

from hf_admm.arguments import ADMMArgumentsMixin
from hf_admm.trainer import ADMMTrainerMixin


@dataclass
class ADMMSeq2SeqTrainingArguments(ADMMArgumentsMixin, Seq2SeqTrainingArguments):
    """[`~transformers.Seq2SeqTrainingArguments`] with the flags of [`ADMMArgumentsMixin`]."""


class ADMMSeq2SeqTrainer(ADMMTrainerMixin, Seq2SeqTrainer):
    """
    [`~transformers.Seq2SeqTrainer`] that fine-tunes to a sparsity pattern. Takes what it takes, with
    [`ADMMSeq2SeqTrainingArguments`] as `args`. With `predict_with_generate`, the sparse weights generate.
    """

    training_args_class = ADMMSeq2SeqTrainingArguments

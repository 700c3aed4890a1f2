"""Ready trainers for other libraries, each with its class of arguments: imported on first use, and only then.

What is here wires a library's trainer to [`hf_admm.ADMMTrainerMixin`] and settles what that library alone needs.
"""

from importlib import import_module
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from hf_admm.integrations.sentence_transformers import (
        ADMMCrossEncoderTrainer,
        ADMMCrossEncoderTrainingArguments,
        ADMMSentenceTransformerTrainer,
        ADMMSentenceTransformerTrainingArguments,
    )
    from hf_admm.integrations.seq2seq import ADMMSeq2SeqTrainer, ADMMSeq2SeqTrainingArguments
    from hf_admm.integrations.trl import (
        ADMMDPOConfig,
        ADMMDPOTrainer,
        ADMMGRPOConfig,
        ADMMGRPOTrainer,
        ADMMKTOConfig,
        ADMMKTOTrainer,
        ADMMRewardConfig,
        ADMMRewardTrainer,
        ADMMRLOOConfig,
        ADMMRLOOTrainer,
        ADMMSFTConfig,
        ADMMSFTTrainer,
    )

_HOMES = {
    "ADMMCrossEncoderTrainer": "sentence_transformers",
    "ADMMCrossEncoderTrainingArguments": "sentence_transformers",
    "ADMMDPOConfig": "trl",
    "ADMMDPOTrainer": "trl",
    "ADMMGRPOConfig": "trl",
    "ADMMGRPOTrainer": "trl",
    "ADMMKTOConfig": "trl",
    "ADMMKTOTrainer": "trl",
    "ADMMRLOOConfig": "trl",
    "ADMMRLOOTrainer": "trl",
    "ADMMRewardConfig": "trl",
    "ADMMRewardTrainer": "trl",
    "ADMMSFTConfig": "trl",
    "ADMMSFTTrainer": "trl",
    "ADMMSentenceTransformerTrainer": "sentence_transformers",
    "ADMMSentenceTransformerTrainingArguments": "sentence_transformers",
    "ADMMSeq2SeqTrainer": "seq2seq",
    "ADMMSeq2SeqTrainingArguments": "seq2seq",
}
# The extra of setup.cfg that brings a library; what needs none is not here.
_EXTRAS = {"sentence_transformers": "sentence-transformers", "trl": "trl"}

__all__ = [
    "ADMMCrossEncoderTrainer",
    "ADMMCrossEncoderTrainingArguments",
    "ADMMDPOConfig",
    "ADMMDPOTrainer",
    "ADMMGRPOConfig",
    "ADMMGRPOTrainer",
    "ADMMKTOConfig",
    "ADMMKTOTrainer",
    "ADMMRLOOConfig",
    "ADMMRLOOTrainer",
    "ADMMRewardConfig",
    "ADMMRewardTrainer",
    "ADMMSFTConfig",
    "ADMMSFTTrainer",
    "ADMMSentenceTransformerTrainer",
    "ADMMSentenceTransformerTrainingArguments",
    "ADMMSeq2SeqTrainer",
    "ADMMSeq2SeqTrainingArguments",
]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOMES[name]
    try:
        module = import_module(f"{__name__}.{home}")
    except ModuleNotFoundError as error:
        if home not in _EXTRAS or error.name != home:
            raise
        extra = _EXTRAS[home]
        raise ImportError(f"{name} needs {extra}, which is not installed: pip install 'hf-admm[{extra}]'.") from error
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

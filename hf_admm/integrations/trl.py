"""The trainers of TRL (https://huggingface.co/docs/trl)."""

from dataclasses import dataclass

from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

from hf_admm.arguments import ADMMArgumentsMixin
from hf_admm.trainer import ADMMTrainerMixin
from hf_admm.training.calibrating import TWO_PHASES_INSTEAD


class _Samples:
    """
    For trainers that train on what the model itself completes. TRL hands the weights to vLLM once a step, and an
    evaluation comes between two steps with weights of its own: the sparse ones. They are handed over before it, and
    those that are trained after it.
    """

    def evaluate(self, *args, **kwargs):
        self._last_loaded_step = -1
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            self._last_loaded_step = -1

    def _refuse_rows_of(self, data):
        raise ValueError(
            f"The rows of {type(self).__name__} are prompts, and what it trains on is sampled as it goes. "
            f"{TWO_PHASES_INSTEAD}"
        )


@dataclass
class ADMMSFTConfig(ADMMArgumentsMixin, SFTConfig):
    """[`~trl.SFTConfig`] with the flags of [`ADMMArgumentsMixin`]."""


class ADMMSFTTrainer(ADMMTrainerMixin, SFTTrainer):
    """
    [`~trl.SFTTrainer`] that fine-tunes to a sparsity pattern. Takes what it takes, with [`ADMMSFTConfig`] as `args`,
    but no `peft_config`.
    """

    training_args_class = ADMMSFTConfig


@dataclass
class ADMMDPOConfig(ADMMArgumentsMixin, DPOConfig):
    """[`~trl.DPOConfig`] with the flags of [`ADMMArgumentsMixin`]."""


class ADMMDPOTrainer(ADMMTrainerMixin, DPOTrainer):
    """
    [`~trl.DPOTrainer`] that fine-tunes to a sparsity pattern. Takes what it takes, with [`ADMMDPOConfig`] as `args`,
    but no `peft_config`. The reference model stays as it is given: dense, or sparse if it was.
    """

    training_args_class = ADMMDPOConfig


@dataclass
class ADMMKTOConfig(ADMMArgumentsMixin, KTOConfig):
    """[`~trl.KTOConfig`] with the flags of [`ADMMArgumentsMixin`]."""


class ADMMKTOTrainer(ADMMTrainerMixin, KTOTrainer):
    """
    [`~trl.KTOTrainer`] that fine-tunes to a sparsity pattern. Takes what it takes, with [`ADMMKTOConfig`] as `args`,
    but no `peft_config`. The reference model stays as it is given: dense, or sparse if it was.
    """

    training_args_class = ADMMKTOConfig


@dataclass
class ADMMRewardConfig(ADMMArgumentsMixin, RewardConfig):
    """[`~trl.RewardConfig`] with the flags of [`ADMMArgumentsMixin`]."""


class ADMMRewardTrainer(ADMMTrainerMixin, RewardTrainer):
    """
    [`~trl.RewardTrainer`] that fine-tunes to a sparsity pattern. Takes what it takes, with [`ADMMRewardConfig`] as
    `args`, but no `peft_config`.
    """

    training_args_class = ADMMRewardConfig


@dataclass
class ADMMGRPOConfig(ADMMArgumentsMixin, GRPOConfig):
    """[`~trl.GRPOConfig`] with the flags of [`ADMMArgumentsMixin`]."""


class ADMMGRPOTrainer(_Samples, ADMMTrainerMixin, GRPOTrainer):
    """
    [`~trl.GRPOTrainer`] that fine-tunes to a sparsity pattern. Takes what it takes, with [`ADMMGRPOConfig`] as `args`,
    but no `peft_config`. Completions are sampled from the weights that are trained: dense in phase 1, masked in
    phase 2; in evaluations from the sparse ones.
    """

    training_args_class = ADMMGRPOConfig


@dataclass
class ADMMRLOOConfig(ADMMArgumentsMixin, RLOOConfig):
    """[`~trl.RLOOConfig`] with the flags of [`ADMMArgumentsMixin`]."""


class ADMMRLOOTrainer(_Samples, ADMMTrainerMixin, RLOOTrainer):
    """
    [`~trl.RLOOTrainer`] that fine-tunes to a sparsity pattern. Takes what it takes, with [`ADMMRLOOConfig`] as `args`,
    but no `peft_config`. Completions are sampled as by [`ADMMGRPOTrainer`].
    """

    training_args_class = ADMMRLOOConfig

"""The flags of sparse fine-tuning."""

import os
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import wraps

from transformers import TrainingArguments

from hf_admm.training.argument_classes import finish_dataclass, inherit_fields, passes_by
from hf_admm.training.derived_flags import DerivedFlags
from hf_admm.training.distillation_arguments import DISTILL_REALS, DistillationArgumentsMixin
from hf_admm.training.zero import refuse_stage
from hf_admm.validation import PLAIN_SCHEDULERS, REALS, unsupported_backend, validate_flags


@dataclass(kw_only=True)
class ADMMArgumentsMixin(DerivedFlags, DistillationArgumentsMixin):
    """
    The flags of sparse fine-tuning for any class of arguments, whose own fields and defaults stay as they are. Every
    flag parses from the command line and from YAML.

    ```python
    @dataclass
    class ADMMSFTConfig(ADMMArgumentsMixin, SFTConfig): ...
    ```

    > Parameters that control what is pruned

    Args:
        sparsity_pattern (`str`, *optional*, defaults to `"2:4"`):
            `"N:M"` (N kept of every M consecutive inputs), `"RxC:K"` (K kept of every block of R outputs by C inputs),
            a density such as `"0.5"`, `"own"` to keep every zero of a model that is sparse already, whatever its
            pattern (the flags of both phases do not apply then), or `"none"` to train as plain `Trainer` does.
        sparsity_include (`list[str]`, *optional*):
            Module names to prune, as suffixes or as one regular expression (PEFT's convention). By default every
            linear layer of the transformer's layers, not the heads.
        sparsity_exclude (`list[str]`, *optional*):
            Module names to leave dense, in the same convention.

        > Parameters that control phase 1, ADMM

        admm_steps (`float`, *optional*):
            Length of phase 1: a share of the run if below 1, else optimizer steps. `None` takes 0 with
            `num_calibration_samples`, else 0.6. It takes 0.5, for dense training, with `distill_teacher="switch"`,
            whose model that is, and with `num_calibration_samples` where the pattern keeps less than half and none of
            `admm_penalty`, an `admm_rho` above 0 and `admm_update_steps` is given (not with an optimizer that swaps
            weights, as schedule-free ones do). With `num_calibration_samples` and `admm_rho=0` any length is dense.
        admm_penalty (`str`, *optional*):
            What pulls the weights to the pattern. `"distance"`: in the last part of the phase, after each step, what
            the projection would prune shrinks by a share that adapts to its length; nothing is to be tuned. The others
            are ADMM with its dual variable, in full: `"loss"`, the penalty's exact gradient joins the gradient of the
            loss, before clipping; `"gradient"`, after it; `"decoupled"`, a proximal step beside the optimizer, as
            AdamW's decay.
            `None` takes `"distance"`, or `"loss"` if `admm_rho` is given.
        admm_rho (`float`, *optional*):
            Strength of the penalty. `None` takes the default of `admm_penalty`: 0.01 for `"loss"`, 0.003 for
            `"gradient"`, 10 for `"decoupled"`, where each step moves a weight by about `learning_rate * admm_rho` of
            its way, and 16 for `"distance"`, by which the shares of all steps add up to it: what the loss leaves alone
            shrinks to `exp(-admm_rho)` of its size. `0` trains phase 1 without a penalty, as `None` does where phase 1
            is dense training by default (see `admm_steps`).
        admm_rho_schedule (`str`, *optional*, defaults to `"constant"`):
            How rho grows to `admm_rho` over phase 1: `"constant"`, `"linear"`, `"cosine"` or `"exponential"`. Not for
            `"distance"`, which pulls in the last 0.4 of the phase (0.7 if less than half is kept).
        admm_update_steps (`int`, *optional*):
            Optimizer steps between two updates of the mask, or of Z and U. `None` takes a 24th of phase 1 for
            `"distance"`, 64 for the others.

        admm_state_dtype (`str`, *optional*, defaults to `"float32"`):
            Dtype of phase 1's state, one tensor of the size of the pruned weights. `"bfloat16"` halves it, and rounds
            the dual variable at each update.
        admm_state_offload (`bool`, *optional*, defaults to `False`):
            Keeps the anchors of weights on a GPU in page-locked CPU memory, in both phases; each step copies them.
        admm_lr_scheduler_type (`str`, *optional*):
            Schedule of the learning rate in phase 1, one of those without arguments. `None` takes `lr_scheduler_type`,
            but `"constant_with_warmup"` for `"distance"` where that is `"linear"`: so W can follow the penalty until
            the switch. Where phase 1 is dense training by default there is none, and `None` takes `lr_scheduler_type`.

        > Parameters that control phase 2, SR-STE

        num_calibration_samples (`int`, *optional*):
            Rows of the training set with which layer-wise ADMM ([`prune_one_shot`]) prunes at the switch to phase 2,
            before the first step if `admm_steps` is 0. With 0, the mask is that of the weights' size. `None` takes
            1024, or as many of them as give every layer 16 tokens per input, but 0 if any of `admm_steps`,
            `admm_penalty`, `admm_rho`, `admm_update_steps` and `admm_lr_scheduler_type` is given (with
            `distill_teacher="switch"`: of those of the penalty).
        srste_mask (`str`, *optional*):
            `"dynamic"`: the mask follows the weights. `"fixed"`: it is frozen at the switch from phase 1. `None` takes
            `"fixed"` with `num_calibration_samples` if neither `srste_decay` nor `mask_update_steps` is given, else
            `"dynamic"`.
        srste_decay (`float`, *optional*):
            SR-STE's lambda: the decay of the pruned weights, added to their gradient. `None` takes 2e-4, but 0 with a
            fixed mask, and after `"distance"` pruned weights shrink on by the share of phase 1's end.
        srste_lr_multiplier (`float`, *optional*):
            Peak learning rate of phase 2, as a multiple of the optimizer's (`learning_rate`, or that of an optimizer
            of your own). A pruned network often recovers faster at a higher rate than the one that suits the dense
            network. `None` takes 2 after `"distance"`, 1 after the others; with `num_calibration_samples`, without a
            phase 1 or after dense training by default, 1 where the pattern keeps half or more, else 2. An absolute
            floor (`min_lr`, `lr_end`) is not multiplied.
        mask_update_steps (`int`, *optional*):
            Optimizer steps between two updates of the mask. `None` takes 1, but as many as in phase 1 where pruned
            weights shrink on, as few come back then; they shrink at the update, for all the steps since the last.
        mask_freeze_steps (`float`, *optional*, defaults to `0.1`):
            The last part of the run, in which the mask is frozen: a share of the run if below 1, else optimizer steps.

        > Parameters that control what is said of the run

        sparsity_report (`bool`, *optional*, defaults to `False`):
            Writes a page with figures of the run to `report/` in `output_dir` when training ends
            ([`ReportCallback`]). Needs matplotlib: `pip install hf-admm[report]`.

        > Parameters that control distillation: those of [`DistillationArgumentsMixin`]

    Raises:
        `ValueError`: If a flag has a value that is not allowed; the message says which are.
    """

    sparsity_pattern: str = field(
        default="2:4",
        metadata={
            "help": "Pattern of the weights: 'N:M' (N kept of M consecutive inputs), 'RxC:K' (K kept of a block of R "
            "outputs by C inputs), a density such as '0.5', 'own' (the model is sparse already: keep its zeros), or "
            "'none' to train as plain Trainer."
        },
    )
    sparsity_include: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names of the modules to prune: suffixes, or one regular expression. By default every linear "
            "layer of the transformer's layers."
        },
    )
    sparsity_exclude: list[str] | None = field(
        default=None,
        metadata={"help": "Names of the modules to leave dense: suffixes, or one regular expression."},
    )
    admm_steps: float | None = field(
        default=None,
        metadata={
            "help": "Length of phase 1 (ADMM): a share of the run if below 1, else optimizer steps. By default 0 with "
            "num_calibration_samples (0.5, dense, where less than half is kept), else 0.6."
        },
    )
    admm_rho: float | None = field(
        default=None,
        metadata={
            "help": "Strength of the penalty. By default 16 for admm_penalty 'distance', 0.01 for 'loss', 0.003 for "
            "'gradient', 10 for 'decoupled'."
        },
    )
    admm_rho_schedule: str = field(
        default="constant",
        metadata={"help": "How rho grows to admm_rho over phase 1: 'constant', 'linear', 'cosine' or 'exponential'."},
    )
    admm_update_steps: int | None = field(
        default=None,
        metadata={
            "help": "Optimizer steps between two updates of the mask, or of Z and U, in phase 1. By default a 24th of "
            "the phase for admm_penalty 'distance', 64 for the others."
        },
    )
    admm_penalty: str | None = field(
        default=None,
        metadata={
            "help": "What pulls the weights to the pattern: 'distance' (shrinks what would be pruned), or ADMM's "
            "penalty in the 'loss' (before gradient clipping), the 'gradient' (after it) or 'decoupled' (a proximal "
            "step beside the optimizer). By default 'distance', or 'loss' if admm_rho is given."
        },
    )
    admm_state_dtype: str = field(
        default="float32",
        metadata={"help": "Dtype of phase 1's state: 'float32', or 'bfloat16' for half the memory."},
    )
    admm_state_offload: bool = field(
        default=False,
        metadata={"help": "Keep the anchors of weights on a GPU in CPU memory; each step copies them."},
    )
    admm_lr_scheduler_type: str | None = field(
        default=None,
        metadata={
            "help": f"Schedule of the learning rate in phase 1: {', '.join(PLAIN_SCHEDULERS)}. By default "
            "lr_scheduler_type; for admm_penalty 'distance', if that is 'linear', 'constant_with_warmup'."
        },
    )
    num_calibration_samples: int | None = field(
        default=None,
        metadata={
            "help": "Rows of the training set with which layer-wise ADMM prunes at the switch to phase 2 (before the "
            "first step if admm_steps is 0); 0 for the mask of the weights' size. By default 1024, and 0 if "
            "admm_steps, admm_penalty, admm_rho, admm_update_steps or admm_lr_scheduler_type is given."
        },
    )
    srste_mask: str | None = field(
        default=None,
        metadata={
            "help": "Mask of phase 2: 'dynamic' (follows the weights) or 'fixed' (frozen at the switch). By default "
            "fixed with num_calibration_samples, else dynamic."
        },
    )
    srste_decay: float | None = field(
        default=None,
        metadata={
            "help": "Decay of the pruned weights in phase 2, SR-STE's lambda. By default 2e-4; after admm_penalty "
            "'distance' they shrink on as at its end, and where the mask is fixed it is 0."
        },
    )
    srste_lr_multiplier: float | None = field(
        default=None,
        metadata={
            "help": "Peak learning rate of phase 2, as a multiple of learning_rate. By default 2 for admm_penalty "
            "'distance', 1 for the others; pruned by the data before training or after a dense half, 1 where the "
            "pattern keeps half or more."
        },
    )
    mask_update_steps: int | None = field(
        default=None,
        metadata={
            "help": "Optimizer steps between two updates of the mask in phase 2. By default as many as in phase 1 "
            "after admm_penalty 'distance', 1 after the others."
        },
    )
    mask_freeze_steps: float = field(
        default=0.1,
        metadata={
            "help": "The last part of the run, with the mask frozen: a share of the run if below 1, else steps."
        },
    )
    sparsity_report: bool = field(
        default=False,
        metadata={
            "help": "Whether to write a page with figures of the run to report/ in output_dir (needs matplotlib)."
        },
    )

    def __new__(cls, *args, **kwargs):
        finish_dataclass(cls)
        return super().__new__(cls)

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        inherit_fields(cls)
        if passes_by(cls, ADMMArgumentsMixin):
            post_init = cls.__post_init__

            @wraps(post_init)
            def __post_init__(self):
                with self._checked():
                    post_init(self)

            __post_init__.goes_on = True
            cls.__post_init__ = __post_init__

    def __post_init__(self):
        with self._checked():
            if after := getattr(super(), "__post_init__", None):
                after()

    @contextmanager
    def _checked(self):
        """What happens before and after the `__post_init__` of the class that this is mixed into."""
        if self.is_sparse and getattr(self, "deepspeed", None):  # before the backend asks for packages and devices
            refuse_stage(self.deepspeed)
        yield
        if self.is_sparse and (getattr(self, "fsdp_plugin_args", None) or {}).get("fsdp_version") == 1:
            raise ValueError(unsupported_backend("FSDP1"))
        if isinstance(self.sparsity_pattern, float):
            self.sparsity_pattern = str(self.sparsity_pattern)
        if isinstance(self.distill_teacher, os.PathLike):
            self.distill_teacher = os.fspath(self.distill_teacher)
        for name in (*REALS, *DISTILL_REALS):
            if isinstance(value := getattr(self, name), str):  # YAML 1.1 reads 1e-3 as one
                with suppress(ValueError):
                    setattr(self, name, float(value))
        if isinstance(self, TrainingArguments):
            self.validate_sparsity()

    def validate_sparsity(self) -> None:
        """
        Checks the flags of sparse fine-tuning. Runs again when training starts: a hyperparameter search sets
        attributes of existing arguments.

        Raises:
            `ValueError`: If a flag has a value that is not allowed.
        """
        validate_flags(self)
        if self.is_sparse and self.max_steps > 0:
            self.phase_plan(self.max_steps)


@dataclass
class ADMMTrainingArguments(ADMMArgumentsMixin, TrainingArguments):
    """
    [`~transformers.TrainingArguments`] with the flags of sparse fine-tuning, those of [`ADMMArgumentsMixin`]. Trainers
    that take arguments of a class of their own need one of that class: mix [`ADMMArgumentsMixin`] into it.

    Raises:
        `ValueError`: If a flag has a value that is not allowed; the message says which are.
    """


def with_flags(wanted: type[TrainingArguments]) -> type[TrainingArguments]:
    """
    A class of arguments with the sparsity flags.

    Args:
        wanted (`type[TrainingArguments]`):
            The class of arguments that a trainer takes.

    Returns:
        `type[TrainingArguments]`: It, if it has them; a class that extends it and can be pickled, if not.
    """
    if issubclass(wanted, ADMMArgumentsMixin):
        return wanted
    if wanted is TrainingArguments:
        return ADMMTrainingArguments

    def __reduce__(self):
        return _restored, (wanted, self.__dict__)

    body = {"__reduce__": __reduce__, "__module__": __name__, "__doc__": f"[`{wanted.__name__}`] with sparsity flags."}
    return dataclass(type(f"ADMM{wanted.__name__}", (ADMMArgumentsMixin, wanted), body))


def _restored(wanted: type[TrainingArguments], state: dict) -> TrainingArguments:
    args = object.__new__(with_flags(wanted))
    args.__dict__.update(state)
    return args

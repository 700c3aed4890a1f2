"""ADMMTrainer: where the method is wired into Trainer."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn
from transformers import Trainer

from hf_admm.arguments import ADMMArgumentsMixin, with_flags
from hf_admm.audit import audit_weights
from hf_admm.audit_report import AuditReport
from hf_admm.callbacks import MetricsCallback, PhaseCallback, PhaseProgressCallback, ReportCallback
from hf_admm.checkpoints.saving import SparseCheckpointsMixin
from hf_admm.checkpoints.state_dict_types import FULL, SHARDED, state_dict_type
from hf_admm.checkpoints.teacher_files import TeacherCheckpointsMixin
from hf_admm.console import get_logger
from hf_admm.mask_audit import audit_masks
from hf_admm.pruning.shards import DTensor, local
from hf_admm.pruning.state import ADMMState
from hf_admm.pruning.weights import PrunedWeights
from hf_admm.reporting.run_reports import RunReportsMixin
from hf_admm.sparsity.refusals import refuse_adapter_config
from hf_admm.sparsity.targets import TargetSelection, select_targets
from hf_admm.training.argument_classes import arguments_class, wrong_arguments
from hf_admm.training.calibrating import CalibrationMixin
from hf_admm.training.learning_rate import phase_scheduler, warn_of_unused_flags
from hf_admm.training.loss_scaling import LossScalingMixin
from hf_admm.training.signatures import GivenArguments, show_arguments
from hf_admm.training.zero import refuse_deepspeed
from hf_admm.validation import unsupported_backend


logger = get_logger(__name__)


class ADMMTrainerMixin(
    RunReportsMixin, TeacherCheckpointsMixin, SparseCheckpointsMixin, LossScalingMixin, CalibrationMixin
):
    """
    Sparse fine-tuning for any `Trainer`, whatever its signature: mix it in before the trainer class, and pass
    [`ADMMTrainingArguments`], or, where the trainer has a class of arguments of its own, one that
    [`ADMMArgumentsMixin`] is mixed into.

    ```python
    class ADMMSeq2SeqTrainer(ADMMTrainerMixin, Seq2SeqTrainer): ...

    @dataclass
    class ADMMSeq2SeqTrainingArguments(ADMMArgumentsMixin, Seq2SeqTrainingArguments): ...
    ```

    Within training, evaluation and every saved model hold weights that obey the pattern; the dense working weights
    live in the sidecar of each checkpoint. After training, the model itself is sparse and `audit` holds the final
    check.
    """

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        order = cls.__mro__
        if Trainer in order and order.index(Trainer) < order.index(ADMMTrainerMixin):
            raise ValueError(
                f"class {cls.__name__}: {ADMMTrainerMixin.__name__} stands behind the trainer, which would train "
                f"densely. Name it first: class {cls.__name__}({ADMMTrainerMixin.__name__}, ...)."
            )
        show_arguments(cls, ADMMTrainerMixin)

    def __init__(self, *positional, **kwargs):
        given = GivenArguments(type(self), ADMMTrainerMixin, "__init__", positional, kwargs)
        wanted, only = arguments_class(type(self), ADMMTrainerMixin)
        args, model = given.get("args"), given.get("model")
        if args is None and given.takes("args"):
            args = with_flags(wanted)(output_dir="tmp_trainer")  # Trainer's own default folder
            given.put("args", args)
        refusal = wrong_arguments(type(self), args, wanted, ADMMArgumentsMixin)
        if refusal and (only or not hasattr(args, "sparsity_pattern")):
            raise ValueError(refusal)
        self.sparsity = ADMMState()
        self.audit: AuditReport | None = None
        self._announced = ""
        if getattr(args, "is_sparse", False):
            # Before Trainer touches the model, so that bad input is refused with the model as it was.
            if not args.is_own:  # whose base stays as it is
                refuse_adapter_config(type(self).__name__, given.get("peft_config"))
            if isinstance(model, nn.Module):  # some trainers take a model's name
                select_targets(model, args.pattern, args.include, args.exclude)
        try:
            super().__init__(*given.args, **given.kwargs)
        except (TypeError, AttributeError) as error:
            if refusal:
                raise ValueError(refusal) from error
            raise
        if not hasattr(self.args, "sparsity_pattern"):  # the trainer has made its own
            raise ValueError(wrong_arguments(type(self), self.args, wanted, ADMMArgumentsMixin))
        self._check_distillation()
        if self.train_dataset is not None:  # without one, evaluation is all that is wanted
            self._check_calibration()
        self._set_up_sparsity()

    def _set_up_sparsity(self) -> None:
        self.audit, self.sparsity.resumed = None, False
        self._forget_loss_scaling()
        ReportCallback.join(self)
        if not self.args.is_sparse:
            self.sparsity.clear()
            return
        self._check_backend()
        self._announce()
        if not any(isinstance(callback, PhaseCallback) for callback in self.callback_handler.callbacks):
            # Right behind DefaultFlowCallback, which decides on logging: the user's callbacks see what ours did.
            ours = [PhaseCallback(self.sparsity, self._at_switch, self._rehearse), MetricsCallback(self.sparsity)]
            ours.append(PhaseProgressCallback(self.sparsity, self.callback_handler))
            self.callback_handler.callbacks[1:1] = ours

    def _check_backend(self) -> None:
        """`accelerate launch` may set one that the arguments do not show."""
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        if self.is_deepspeed_enabled:
            refuse_deepspeed(self.args, self.accelerator.state.deepspeed_plugin.deepspeed_config)
        if plugin and plugin.fsdp_version == 1:
            raise ValueError(unsupported_backend("FSDP1"))
        if plugin and state_dict_type(self.accelerator) not in (FULL, SHARDED):
            raise ValueError(
                f"FSDP with state_dict_type={plugin.state_dict_type} is not supported. Set it to {FULL}, so that "
                f"every checkpoint of a sparse run loads anywhere, or to {SHARDED}, which writes in parallel."
            )

    def _announce(self) -> None:
        selection = self.select_targets()
        table = f"Pattern {self.args.pattern}:\n{selection.table()}"
        if table != self._announced:
            self._announced = table
            logger.info(table)
            if warning := selection.warning():
                logger.warning(warning)

    def select_targets(self) -> TargetSelection:
        """Which weights of the model are pruned by these arguments, and why the others are not."""
        return select_targets(self.model, self.args.pattern, self.args.include, self.args.exclude)

    def target_table(self) -> str:
        """The dry run: a table of the weights with name, shape, and pruned or why not."""
        if not self.args.is_sparse:
            return "sparsity_pattern='none': nothing is pruned"
        return self.select_targets().table()

    # ---- Training ----

    def train(self, *args, **kwargs):
        try:
            output = super().train(*args, **kwargs)
        except BaseException:
            # An error or a keyboard interrupt in the middle of a step of phase 2 comes while the weights are masked.
            self.sparsity.restore_dense()
            self.sparsity.weights.remembered = {}  # what the user makes of the model from here on is to stay
            raise
        if self.sparsity.finished:
            self._audit()
            self._say_closing()
        return output

    def _hp_search_setup(self, trial) -> None:
        # In every `train()`, after `model_init` has made its model and once a trial has set its arguments.
        super()._hp_search_setup(trial)
        self.args.validate_sparsity()
        self._check_calibration(says=True)
        self._set_up_sparsity()
        self._prepare_teacher()

    def _at_switch(self, weights: PrunedWeights) -> dict[str, float]:
        self._take_teacher()
        return self._calibrate(weights) if self.args.calibration_samples else {}

    def _audit(self) -> None:
        weights = self.sparsity.weights
        if self.args.is_own:
            self.audit = audit_masks(weights.whole_masks(), weights.still_frozen(), weights.released)
        else:
            self.audit = audit_weights(weights.whole(), weights.pattern, weights.released)
        logger.info(f"Final audit:\n{self.audit.table()}")
        if not self.audit.ok:
            fault = f"groups break the pattern {self.args.pattern}"
            if self.args.is_own:
                fault = "zeros that the model brought are lost"
            raise RuntimeError(
                f"{self.audit.violations} {fault} after training. Something wrote to the weights "
                f"behind the trainer's back.\n{self.audit.table()}"
            )

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        """
        The learning rate with a segment for each phase: each is a whole schedule of `lr_scheduler_type`, or of
        `admm_lr_scheduler_type` in phase 1, from its peak, since a single decay would leave phase 2 nothing to learn
        with. Each takes its share of the warm-up. A scheduler that was passed is left as it is.
        """
        if self.args.is_sparse and self.lr_scheduler is not None:
            warn_of_unused_flags(self.args)
        elif self.args.is_sparse:
            in_use = self.optimizer if optimizer is None else optimizer
            self.lr_scheduler = phase_scheduler(self.args, in_use, num_training_steps)
            self._created_lr_scheduler = self.lr_scheduler is not None
        return super().create_scheduler(num_training_steps, optimizer)

    def _clip_grad_norm(self, model):
        self._pull_gradients()
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model, grad_norm=None):
        self._pull_gradients()  # without clipping
        grad_norm = super()._get_grad_norm(model, grad_norm)
        if self.args.is_sparse:
            # The gradients of all processes: where those of one are not finite, every one stops.
            norm = float(grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm)
            # DeepSpeed has taken the step by now, and keeps no gradients.
            if not math.isfinite(norm) and (self.is_deepspeed_enabled or self._has_broken_gradients(model)):
                self._stop_at(norm)
        return grad_norm

    def _has_broken_gradients(self, model) -> bool:
        """Squares of large gradients overflow, and their norm: clipping makes zeros of them, which harm nothing."""
        gradients = [local(parameter.grad) for parameter in model.parameters() if parameter.grad is not None]
        broken = torch.tensor([any(not gradient.isfinite().all() for gradient in gradients)], device=self.args.device)
        return bool(self.accelerator.gather(broken.int()).any())

    def _pull_gradients(self) -> None:
        """
        The penalty's exact gradient, once per optimizer step: gradients are accumulated and reduced, not yet clipped.
        As a term of the loss it would be divided by the accumulation steps and mixed into the logged task loss.
        """
        if self.sparsity.phase.prunes:
            scaler = self.accelerator.scaler
            settings = self.args.phase_settings(self.state.max_steps)
            self.sparsity.before_clipping(settings, 1.0 if scaler is None else scaler.get_scale())

    def _stop_at(self, norm: float) -> None:
        """Every weight would be NaN after this step, and every later checkpoint with them."""
        scaler = self.accelerator.scaler
        if scaler is not None and scaler.get_scale() >= 1.0:
            return  # fp16: the step is skipped and the scale halved, until it is clear that it was not the scale
        raise FloatingPointError(
            f"The norm of the gradients of step {self.state.global_step + 1} is {norm}: training stops before "
            f"{'a checkpoint takes' if self.is_deepspeed_enabled else 'the weights take'} it in. The last checkpoint "
            f"is {self.last_checkpoint or 'none, nothing was saved yet'}. "
            "Resume from there with a lower learning_rate or max_grad_norm, in bf16 or float32 instead of fp16, and "
            "look for examples with extreme values."
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self.args.is_sparse:
            logs |= {f"admm/{name}": float(figure) for name, figure in self.sparsity.figures.items()}
        super().log(logs, start_time)

    # ---- Sparse weights ----

    @contextmanager
    def sparse_weights(self) -> Iterator[None]:
        """
        Within it, the model holds the weights that obey the pattern, as they are evaluated and saved; after it, the
        dense weights that training needs. For callbacks and code of one's own that evaluate, generate or save while
        training goes on. What is written to the pruned weights within it is lost.

        ```python
        class Sampler(TrainerCallback):
            def on_epoch_end(self, args, state, control, model=None, **kwargs):
                with trainer.sparse_weights():
                    model.save_pretrained(f"samples/{state.global_step}")
        ```
        """
        with self.sparsity.sparse_weights():
            yield

    def evaluate(self, *args, **kwargs):
        with self.sparsity.sparse_weights():  # with the events at its end
            return super().evaluate(*args, **kwargs)

    def predict(self, *args, **kwargs):
        with self.sparsity.sparse_weights():
            return super().predict(*args, **kwargs)

    def evaluation_loop(self, *args, **kwargs):
        with self.sparsity.sparse_weights():
            return super().evaluation_loop(*args, **kwargs)

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        # One projection for the evaluation, the checkpoint and what callbacks do with either.
        due = self.control.should_evaluate or self.control.should_save
        with self.sparsity.sparse_weights() if due else nullcontext():
            super()._maybe_log_save_evaluate(*args, **kwargs)


class ADMMTrainer(ADMMTrainerMixin, Trainer):
    """
    [`~transformers.Trainer`] that fine-tunes a transformer to a sparsity pattern: pruned by its data before training
    or after a dense half, or in two phases, ADMM and SR-STE. Takes what `Trainer` takes, with
    [`ADMMTrainingArguments`] as `args`.

    Raises:
        `ValueError`: If no layer matches, the pattern does not fit one, the model is quantized, or the backend is not
            supported; the message says what to do.

    Example:

    ```python
    from hf_admm import ADMMTrainer, ADMMTrainingArguments

    args = ADMMTrainingArguments(output_dir="sparse", sparsity_pattern="2:4", num_train_epochs=5, learning_rate=1e-4)
    trainer = ADMMTrainer(model=model, args=args, train_dataset=train_dataset, eval_dataset=eval_dataset)
    trainer.train()
    trainer.save_model("sparse/model")  # loads with plain from_pretrained
    ```
    """

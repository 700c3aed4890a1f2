"""ADMMTrainer: where the method is wired into Trainer."""

import math
from pathlib import Path

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, get_scheduler
from transformers.utils import logging

from hf_admm.arguments import ADMMArgumentsMixin, with_flags
from hf_admm.audit import AuditReport
from hf_admm.callbacks import ADMMCallback, MetricsCallback, SRSTECallback
from hf_admm.checkpoints.saving import SparseCheckpointsMixin
from hf_admm.pruning.schedules import join_segments
from hf_admm.pruning.shards import DTensor, reshard
from hf_admm.pruning.state import ADMMState
from hf_admm.sparsity.targets import TargetSelection, select_targets
from hf_admm.training.argument_classes import arguments_class, wrong_arguments
from hf_admm.training.loss_scaling import returns_plain_mean
from hf_admm.training.signatures import GivenArguments, show_arguments
from hf_admm.validation import unsupported_backend


logger = logging.get_logger(__name__)


class ADMMTrainerMixin(SparseCheckpointsMixin):
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
        self._averages_loss = False
        if isinstance(model, nn.Module) and getattr(args, "is_sparse", False):  # some trainers take a model's name
            # Before Trainer touches the model, so that bad input is refused with the model as it was.
            select_targets(model, args.pattern, args.include, args.exclude)
        try:
            super().__init__(*given.args, **given.kwargs)
        except (TypeError, AttributeError) as error:
            if refusal:
                raise ValueError(refusal) from error
            raise
        if not hasattr(self.args, "sparsity_pattern"):  # the trainer has made its own
            raise ValueError(wrong_arguments(type(self), self.args, wanted, ADMMArgumentsMixin))
        self._set_up_sparsity()

    def _set_up_sparsity(self) -> None:
        self.audit, self.sparsity.resumed = None, False
        if self._averages_loss:
            self.model_accepts_loss_kwargs, self._averages_loss = True, False
        if not self.args.is_sparse:
            self.sparsity.clear()
            return
        self._check_backend()
        self._announce()
        if not any(isinstance(callback, ADMMCallback) for callback in self.callback_handler.callbacks):
            # Right behind DefaultFlowCallback, which decides on logging: the user's callbacks see what ours did.
            ours = [ADMMCallback(self.sparsity), SRSTECallback(self.sparsity), MetricsCallback(self.sparsity)]
            self.callback_handler.callbacks[1:1] = ours
        own = self.label_smoother is None and self.compute_loss_func is None
        model = self.accelerator.unwrap_model(self.model)
        if own and self.model_accepts_loss_kwargs and returns_plain_mean(model):
            # It would be multiplied by the accumulation steps and by the processes, and the penalty is not.
            self.model_accepts_loss_kwargs, self._averages_loss = False, True
            logger.info(f"The loss of {type(self.model).__name__} is a plain mean: Trainer averages it over a step.")

    def _check_backend(self) -> None:
        """`accelerate launch` may set one that the arguments do not show."""
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        if self.is_deepspeed_enabled or (plugin and plugin.fsdp_version == 1):
            raise ValueError(unsupported_backend("DeepSpeed" if self.is_deepspeed_enabled else "FSDP1"))
        if plugin and "FULL_STATE_DICT" not in str(plugin.state_dict_type):
            raise ValueError(
                f"FSDP with state_dict_type={plugin.state_dict_type} saves checkpoints without a model.safetensors. "
                "Set it to FULL_STATE_DICT, so that every checkpoint of a sparse run loads anywhere."
            )

    def _announce(self) -> None:
        selection = self.select_targets()
        headline = f"pattern {self.args.pattern}, {selection.summary()}"
        if headline == self._announced:
            return
        self._announced = headline
        logger.info(f"Pattern {self.args.pattern}:\n{selection.table()}")
        if self.is_world_process_zero():
            print(f"hf_admm: {headline}")

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
            if self.sparsity.masked:
                reshard(self.sparsity.model)
                self.sparsity.unmask_weights()
            raise
        if self.sparsity.phase == "sparse":
            self._audit()
        return output

    def _hp_search_setup(self, trial) -> None:
        # In every `train()`, after `model_init` has made its model and once a trial has set its arguments.
        super()._hp_search_setup(trial)
        self.args.validate_sparsity()
        self._set_up_sparsity()

    def _audit(self) -> None:
        self.audit = self.sparsity.audit()
        logger.info(f"Final audit:\n{self.audit.table()}")
        if self.is_world_process_zero():
            print(f"hf_admm: final audit, {self.audit.verdict()}")
        if not self.audit.ok:
            raise RuntimeError(
                f"{self.audit.violations} groups break the pattern {self.args.pattern} after training. Something "
                f"wrote to the weights behind the trainer's back.\n{self.audit.table()}"
            )

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        """
        The learning rate with a segment for each phase: each is a whole schedule of `lr_scheduler_type`, or of
        `admm_lr_scheduler_type` in phase 1, from its peak, since a single decay would leave phase 2 nothing to learn
        with. Each takes its share of the warm-up.
        """
        if not self.args.is_sparse:
            return super().create_scheduler(num_training_steps, optimizer)
        plan, last = self.args.phase_plan(num_training_steps), self.args.srste_lr_multiplier
        segments = plan.segments
        peaks = [1.0, last] if len(segments) > 1 else [1.0 if plan.admm_steps else last]
        own = len(segments) > 1 or peaks != [1.0] or (plan.admm_steps and self.args.admm_lr_scheduler_type)
        if self.lr_scheduler is None and own:
            warmup = self.args.get_warmup_steps(num_training_steps) / num_training_steps
            kinds = ([self.args.admm_lr_scheduler_type] if plan.admm_steps else []) + [None]
            parts = [self._segment(steps, round(warmup * steps), kinds[i]) for i, steps in enumerate(segments)]
            if all(isinstance(part, LambdaLR) for part in parts):
                multiplier = join_segments([part.lr_lambdas[0] for part in parts], segments, peaks)
                self.lr_scheduler = LambdaLR(optimizer or self.optimizer, multiplier)
                self._created_lr_scheduler = True
            else:
                logger.warning(
                    f"lr_scheduler_type={self.args.lr_scheduler_type} has no fixed length, so it runs through both "
                    "phases, at one peak, instead of starting again at the switch."
                )
        return super().create_scheduler(num_training_steps, optimizer)

    def _segment(self, steps: int, warmup_steps: int, kind: str | None):
        """The schedule of one phase, on a stand-in optimizer: only its multiplier is wanted."""
        stand_in = torch.optim.SGD([torch.zeros(1)], lr=self.args.learning_rate)
        return get_scheduler(
            kind or self.args.lr_scheduler_type,
            optimizer=stand_in,
            num_warmup_steps=warmup_steps,
            num_training_steps=steps,
            scheduler_specific_kwargs=None if kind else self.args.lr_scheduler_kwargs,
        )

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if self.args.is_sparse and not loss.isfinite():  # Trainer looks at each loss too, and goes on
            inputs = args[1] if len(args) > 1 else kwargs["inputs"]
            self._stop_at("loss", loss.item(), inputs)
        # The penalty's exact gradient, once per optimizer step: gradients are accumulated and reduced, not yet
        # clipped. As a term of the loss it would be divided by the accumulation steps and mixed into the logged task
        # loss.
        if self.sparsity.phase == "admm" and self.args.admm_penalty == "loss" and self.accelerator.sync_gradients:
            scaler = self.accelerator.scaler
            self.sparsity.pull_gradients(self.sparsity.rho * (1.0 if scaler is None else scaler.get_scale()))
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        grad_norm = super()._get_grad_norm(model, grad_norm)
        if self.args.is_sparse:
            # The gradients of all processes: where the loss of one is not finite, every one stops.
            norm = float(grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm)
            if not math.isfinite(norm):
                self._stop_at("norm of the gradients", norm)
        return grad_norm

    def _stop_at(self, what: str, value: float, inputs: dict | None = None) -> None:
        """Every weight would be NaN after this step, and every later checkpoint with them."""
        scaler = self.accelerator.scaler
        if scaler is not None and scaler.get_scale() >= 1.0:
            return  # fp16: the step is skipped and the scale halved, until it is clear that it was not the scale
        labels = (inputs or {}).get("labels")
        if isinstance(labels, torch.Tensor) and (labels == -100).all():
            return  # a mean over no label at all, whose gradient is zero
        raise FloatingPointError(
            f"The {what} of step {self.state.global_step + 1} is {value}: training stops before the weights take it "
            f"in. The last checkpoint is {self.last_checkpoint or 'none, nothing was saved yet'}. Resume from there "
            "with a lower learning_rate or max_grad_norm, in bf16 or float32 instead of fp16, and look for examples "
            "with extreme values."
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self.args.is_sparse:
            logs |= {f"admm/{name}": float(figure) for name, figure in self.sparsity.figures.items()}
        super().log(logs, start_time)

    def evaluation_loop(self, *args, **kwargs):
        with self.sparsity.sparse_weights():
            return super().evaluation_loop(*args, **kwargs)

    def create_model_card(self, *args, **kwargs) -> None:
        """[`~transformers.Trainer.create_model_card`], with tags and a section for the sparsity."""
        if self.sparsity.phase is None:
            return super().create_model_card(*args, **kwargs)
        given = GivenArguments(type(self), ADMMTrainerMixin, "create_model_card", args, kwargs)
        if given.takes("tags"):
            tags = given.get("tags") or []
            tags = [tags] if isinstance(tags, str) else list(tags)
            ours = ("hf-admm", "sparsity", str(self.sparsity.pattern))
            given.put("tags", tags + [tag for tag in ours if tag not in tags])
        super().create_model_card(*given.args, **given.kwargs)
        path = Path(self.args.output_dir) / "README.md"
        if self.is_world_process_zero() and path.is_file():
            pattern, held = self.sparsity.pattern, len(self.sparsity.targets)
            with open(path, "a", encoding="utf-8") as card:
                card.write(f"\n### Sparsity\n\nEvery group of {held} weights obeys the pattern `{pattern}`.\n")


class ADMMTrainer(ADMMTrainerMixin, Trainer):
    """
    [`~transformers.Trainer`] that fine-tunes a transformer to a sparsity pattern: ADMM, then SR-STE. Takes what
    `Trainer` takes, with [`ADMMTrainingArguments`] as `args`.

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

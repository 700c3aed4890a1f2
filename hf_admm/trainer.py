"""ADMMTrainer: where the method is wired into Trainer."""

import json
import os
import shutil
from pathlib import Path

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, get_scheduler
from transformers.utils import logging

from hf_admm.arguments import ADMMTrainingArguments, unsupported_backend
from hf_admm.audit import AuditReport
from hf_admm.callbacks import ADMMCallback, MetricsCallback, SRSTECallback
from hf_admm.checkpoint_files import RECORD_NAME, RECORD_VERSION, read_names
from hf_admm.loss_scaling import returns_plain_mean
from hf_admm.schedules import join_segments
from hf_admm.sidecar import check_sidecar, load_sidecar, save_sidecar
from hf_admm.state import ADMMState
from hf_admm.targets import TargetSelection, select_targets
from hf_admm.version import __version__


logger = logging.get_logger(__name__)


class ADMMTrainerMixin:
    """
    Sparse fine-tuning for any `Trainer`: mix it in before the trainer class, and pass [`ADMMTrainingArguments`] or a
    class that extends them.

    ```python
    class ADMMSeq2SeqTrainer(ADMMTrainerMixin, Seq2SeqTrainer): ...
    ```

    Within training, evaluation and every saved model hold weights that obey the pattern; the dense working weights
    live in the sidecar of each checkpoint. After training, the model itself is sparse and `audit` holds the final
    check.
    """

    def __init__(self, model=None, args=None, *positional, **kwargs):
        if args is None:
            args = ADMMTrainingArguments(output_dir="tmp_trainer")  # Trainer's own default folder
        if not hasattr(args, "sparsity_pattern"):
            raise ValueError(
                f"{type(self).__name__} got args of type {type(args).__name__}, which have no sparsity flags. Pass "
                "hf_admm.ADMMTrainingArguments, or a class that extends it."
            )
        self.sparsity = ADMMState()
        self.audit: AuditReport | None = None
        self._announced = ""
        self._averages_loss = False
        if isinstance(model, nn.Module) and args.is_sparse:  # some trainers take the name of a model
            # Before Trainer touches the model, so that bad input is refused with the model as it was.
            select_targets(model, args.pattern, args.include, args.exclude)
        super().__init__(model, args, *positional, **kwargs)
        self._set_up_sparsity()

    def _set_up_sparsity(self) -> None:
        self.audit, self.sparsity.resumed = None, False
        if self._averages_loss:
            self.model_accepts_loss_kwargs, self._averages_loss = True, False
        if not self.args.is_sparse:
            self.sparsity.clear()
            return
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:  # as set by `accelerate launch`
            raise ValueError(unsupported_backend("DeepSpeed" if self.is_deepspeed_enabled else "FSDP"))
        self._announce()
        if not any(isinstance(callback, ADMMCallback) for callback in self.callback_handler.callbacks):
            # Right behind DefaultFlowCallback, which decides on logging: the user's callbacks see what ours did.
            ours = [ADMMCallback(self.sparsity), SRSTECallback(self.sparsity), MetricsCallback(self.sparsity)]
            self.callback_handler.callbacks[1:1] = ours
        models_own = self.label_smoother is None and self.compute_loss_func is None
        if (
            models_own
            and self.model_accepts_loss_kwargs
            and returns_plain_mean(self.accelerator.unwrap_model(self.model))
        ):
            # It would be multiplied by the accumulation steps and by the processes, and the penalty is not.
            self.model_accepts_loss_kwargs, self._averages_loss = False, True
            logger.info(f"The loss of {type(self.model).__name__} is a plain mean: Trainer averages it over a step.")

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
        finally:
            # An error or a keyboard interrupt in the middle of a step of phase 2 comes while the weights are masked.
            self.sparsity.unmask_weights()
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
        The learning rate with a segment for each phase: each is a whole schedule of `lr_scheduler_type` from the peak,
        since a single decay would leave phase 2 nothing to learn with. Warm-up belongs to the first.
        """
        if not self.args.is_sparse:
            return super().create_scheduler(num_training_steps, optimizer)
        segments = self.args.phase_plan(num_training_steps).segments
        if self.lr_scheduler is None and len(segments) > 1:
            warmups = [self.args.get_warmup_steps(num_training_steps), 0]
            parts = [self._segment(*segment) for segment in zip(segments, warmups, strict=True)]
            if all(isinstance(part, LambdaLR) for part in parts):
                multiplier = join_segments([part.lr_lambdas[0] for part in parts], segments)
                self.lr_scheduler = LambdaLR(optimizer or self.optimizer, multiplier)
                self._created_lr_scheduler = True
            else:
                logger.warning(
                    f"lr_scheduler_type={self.args.lr_scheduler_type} has no fixed length, so it runs through both "
                    "phases instead of starting again at the switch."
                )
        return super().create_scheduler(num_training_steps, optimizer)

    def _segment(self, steps: int, warmup_steps: int):
        """The schedule of one phase, on a stand-in optimizer: only its multiplier is wanted."""
        stand_in = torch.optim.SGD([torch.zeros(1)], lr=self.args.learning_rate)
        return get_scheduler(
            self.args.lr_scheduler_type,
            optimizer=stand_in,
            num_warmup_steps=warmup_steps,
            num_training_steps=steps,
            scheduler_specific_kwargs=self.args.lr_scheduler_kwargs,
        )

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        # The penalty's exact gradient, once per optimizer step: gradients are accumulated and reduced, not yet
        # clipped. As a term of the loss it would be divided by the accumulation steps and mixed into the logged task
        # loss.
        if self.sparsity.phase == "admm" and self.args.admm_penalty == "loss" and self.accelerator.sync_gradients:
            scaler = self.accelerator.scaler
            self.sparsity.pull_gradients(self.sparsity.rho * (1.0 if scaler is None else scaler.get_scale()))
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self.args.is_sparse:
            logs |= {f"admm/{name}": float(figure) for name, figure in self.sparsity.figures.items()}
        super().log(logs, start_time)

    # ---- Evaluation, checkpoints, final save: invariant 1 of the design ----

    def evaluation_loop(self, *args, **kwargs):
        with self.sparsity.sparse_weights():
            return super().evaluation_loop(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        with self.sparsity.sparse_weights():
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save and self.sparsity.phase is not None:
            self._save_record(Path(output_dir if output_dir is not None else self.args.output_dir))

    def _save_record(self, folder: Path) -> None:
        """What `hf-admm verify` checks against; nothing needs it to load the model."""
        # A few families are saved under other keys than their parameters have; verify judges those by their zeros.
        saved = read_names(folder)
        record = {
            "format_version": RECORD_VERSION,
            "hf_admm_version": __version__,
            "pattern": str(self.sparsity.pattern),
            "targets": {
                name: {"transposed": target.transposed}
                for name, target in self.sparsity.targets.items()
                if name in saved
            },
        }
        temporary = folder / f"{RECORD_NAME}.tmp"
        temporary.write_text(json.dumps(record, indent=2) + "\n")
        os.replace(temporary, folder / RECORD_NAME)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save and self.sparsity.phase in ("admm", "srste"):
            self.sparsity.unmask_weights()
            save_sidecar(self.sparsity, output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if os.path.isdir(resume_from_checkpoint):  # else Trainer's own message is the better one
            targets = self.select_targets().targets if self.args.is_sparse else {}
            check_sidecar(resume_from_checkpoint, self.args.pattern, targets)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.args.is_sparse:
            self.sparsity.reset(self.model, self.args.pattern, self.select_targets().targets)
            load_sidecar(self.sparsity, checkpoint)

    def _load_best_model(self) -> None:
        # Its weights are sparse already, with a mask of their own.
        self.sparsity.unmask_weights()
        super()._load_best_model()
        # If the folder is gone, Trainer warns and goes on with the last weights: `on_train_end` prunes those.
        if self.sparsity.phase in ("admm", "srste") and self.sparsity.audit().ok:
            self.sparsity.phase = "sparse"
            self.sparsity.anchors, self.sparsity.masks = {}, {}

    # ---- Hub ----

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        record = Path(checkpoint_folder) / RECORD_NAME
        if self.args.should_save and record.is_file():  # Trainer copies a fixed list of files
            shutil.copy(record, self.args.output_dir)
        super()._push_from_checkpoint(checkpoint_folder)

    def create_model_card(self, language=None, license=None, tags=None, *args, **kwargs) -> None:
        """[`~transformers.Trainer.create_model_card`], with tags and a section for the sparsity."""
        if self.sparsity.phase is None:
            return super().create_model_card(language, license, tags, *args, **kwargs)
        tags = [tags] if isinstance(tags, str) else list(tags or [])
        tags += [tag for tag in ("hf-admm", "sparsity", str(self.sparsity.pattern)) if tag not in tags]
        super().create_model_card(language, license, tags, *args, **kwargs)
        if self.is_world_process_zero():
            with self.sparsity.sparse_weights():
                verdict = self.sparsity.audit().verdict()
            with open(Path(self.args.output_dir) / "README.md", "a", encoding="utf-8") as card:
                card.write(f"\n### Sparsity\n\nPattern `{self.sparsity.pattern}`, checked: {verdict}\n")


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

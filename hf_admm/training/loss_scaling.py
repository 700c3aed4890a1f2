"""Whether a model divides its loss by the number of items that Trainer tells it.

Trainer takes every model whose `forward` accepts `**kwargs` for one that normalises its loss by `num_items_in_batch`,
and then neither divides by the accumulation steps nor lets DDP's mean stand. Many heads, BERT's classifier among them,
accept the argument and return a plain mean: their gradient and their logged loss come out multiplied by the
accumulation steps and by the number of processes, and rho means something else in every set-up.

Nothing in a model's code says which of the two it is, so it is measured.
"""

import copy
import math

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn
from transformers import Trainer

from hf_admm.console import get_logger
from hf_admm.training.traceless import as_it_was, same_randomness


logger = get_logger(__name__)

# The verdicts, in the order in which that of one process overrules that of another.
UNKNOWN, MEAN, COUNTS, FAILED = range(4)


class LossScalingMixin:
    """
    The part of [`ADMMTrainerMixin`] that has Trainer average the losses that are plain means.

    A loss that is somebody's own (an overridden `compute_loss`, a `compute_loss_func`, label smoothing, a
    `loss_is_scaled_for_ga` that says so) is scaled exactly as plain `Trainer` scales it, and so is that of a model
    that uses the count.
    """

    _averages_loss = False
    _settled_for: nn.Module | None = None  # the model for which the question is settled

    def _forget_loss_scaling(self) -> None:
        if self._averages_loss:
            self.model_accepts_loss_kwargs = True
        self._averages_loss, self._settled_for = False, None

    def _get_num_items_in_batch(self, batch_samples, *args, **kwargs):
        # Where training and evaluation first need the answer, and hold the batches that give it.
        if self._settled_for is not self.model:
            self._forget_loss_scaling()
        if self._averages_loss:
            # It makes no use of the count, but a `training_step` of the user's gets what Trainer would give it.
            self.model_accepts_loss_kwargs = True
        try:
            count = super()._get_num_items_in_batch(batch_samples, *args, **kwargs)
        finally:
            if self._averages_loss:
                self.model_accepts_loss_kwargs = False
        if count is None or self._settled_for is self.model or not self._scaling_matters():
            return count
        for batch in batch_samples:
            verdict = self._agree(self._measure(batch, count))
            if verdict == UNKNOWN:
                continue  # as of a batch without a label; if all are, the next step asks again
            self._settled_for = self.model
            if verdict == MEAN:
                # It would be multiplied by the accumulation steps and by the processes, and the penalty is not.
                self.model_accepts_loss_kwargs, self._averages_loss = False, True
                logger.info(
                    f"The loss of {type(self.model).__name__} is a plain mean: Trainer averages it over a step."
                )
            break
        return count

    def _scaling_matters(self) -> bool:
        args, parallel = self.args, getattr(self.accelerator, "parallelism_config", None)
        return (
            args.is_sparse
            and (args.gradient_accumulation_steps > 1 or args.world_size > 1 or args.n_gpu > 1)
            and getattr(self.compute_loss, "__func__", None) is Trainer.compute_loss
            and self.compute_loss_func is None
            and self.label_smoother is None
            and not getattr(self, "loss_is_scaled_for_ga", None)
            # Sequences divided among the processes pass through contexts that divide the batch in place.
            and not getattr(parallel, "cp_enabled", False)
            and not getattr(parallel, "sp_enabled", False)
        )

    def _measure(self, batch, count) -> int:
        try:
            one, other = self._losses(batch, count)
        except Exception as error:
            if should_reduce_batch_size(error):
                raise  # for `auto_find_batch_size`
            logger.warning(
                f"Whether {type(self.model).__name__} divides its loss by num_items_in_batch could not be measured "
                f"({type(error).__name__}: {error}). It is taken to, as Trainer does. If it "
                "is a plain mean, its gradients are too large by gradient_accumulation_steps: mend that error first."
            )
            return FAILED
        if not (math.isfinite(one) and math.isfinite(other)) or one == other == 0:
            return UNKNOWN
        return COUNTS if abs(one - other) > 1e-3 * abs(one) else MEAN

    def _losses(self, batch, count) -> list[float]:
        """The loss of a batch with the count, and with twice the count; nothing else is changed by it."""
        if isinstance(count, torch.Tensor):
            count = count.reshape(-1)[0]  # DataParallel has one for each device
        losses = []
        with as_it_was(self.model, self), torch.no_grad():
            self.model.train()  # some models return no loss, or another one, in evaluation
            for factor in (1, 2):
                with same_randomness(self.model, self.args.device):
                    inputs = self._prepare_inputs(copy.deepcopy(batch))
                    with self.compute_loss_context_manager():
                        loss = self.compute_loss(self.model, inputs, num_items_in_batch=factor * count)
                    losses.append(float(loss.mean()))
        return losses

    def _agree(self, verdict: int) -> int:
        if self.args.world_size == 1:
            return verdict
        return int(self.accelerator.gather(torch.tensor([verdict], device=self.args.device)).max())

"""When a run prunes by what its data put into the layers: at the switch, with some rows of the training set."""

from collections.abc import Mapping
from functools import partial

import torch
from accelerate.data_loader import IterableDatasetShard
from datasets import IterableDataset
from torch import distributed

from hf_admm.console import get_logger
from hf_admm.pruning.calibration import prune_in_blocks
from hf_admm.pruning.layerwise import prune_layer
from hf_admm.pruning.weights import PrunedWeights
from hf_admm.sparsity.patterns import SparsityPattern
from hf_admm.training.traceless import as_it_was, same_randomness


logger = get_logger(__name__)


class CalibrationMixin:
    """
    The part of [`ADMMTrainerMixin`] that prunes by layer-wise ADMM at the switch to phase 2, or before the first step
    where there is no phase 1.

    The rows lie evenly over the data of the training's own data loader, and go through its collator and the trainer's
    `compute_loss`, in evaluation mode, on every process alike. They draw no random number, and change nothing but the
    weights.
    """

    def _check_calibration(self) -> None:
        """Where it is the default and can't be done, the run has two phases instead."""
        args = self.args
        if not args.calibration_samples:
            return
        try:
            self._refuse_rows_of(self.train_dataset)
        except ValueError as error:
            if args.num_calibration_samples is not None:
                raise
            args.num_calibration_samples = 0
            logger.warning(f"{error} Until then the run has two phases, as with 0.")

    def _refuse_rows_of(self, data) -> None:
        if isinstance(data, IterableDataset):
            return
        if isinstance(data, Mapping) or not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
            kind = type(data).__name__
            reason = f"a {kind}, has no rows that can be looked up"
            if data is None:
                reason = "there is no train_dataset"
            elif isinstance(data, Mapping):
                reason = f"train_dataset, a {kind}, holds several data sets"
            raise ValueError(
                f"num_calibration_samples={self.args.calibration_samples}, but {reason}. Set it to 0, and prune "
                "before training with prune_one_shot instead."
            )

    def _calibrate(self, weights: PrunedWeights) -> dict[str, float]:
        """Prunes the weights, and returns how much of each layer's output was changed, by the name of the weight."""
        logger.info(f"Layer-wise ADMM with {self.args.calibration_samples} rows of the training set.")
        with as_it_was(self.model, self), same_randomness(self.model, self.args.device):
            errors = prune_in_blocks(
                weights,
                self._calibration_batches(),
                partial(_prune_alike, pattern=weights.pattern),
                self._calibration_forward,
                leaves_unreached=True,
            )
        if left := [name for name in weights.targets if name not in errors]:
            logger.warning(
                f"The calibration rows do not reach the forward of these layers, whose mask is that of their weights' "
                f"size: {', '.join(left)}. Parts of nn.MultiheadAttention and unused experts are such."
            )
        return errors

    def _calibration_batches(self) -> list:
        loader, most = self.callback_handler.train_dataloader, self.args.calibration_samples
        # A loader of the user's own may have neither.
        data = getattr(loader, "dataset", self.train_dataset)
        collate = getattr(loader, "collate_fn", self.data_collator)
        size = self.args.per_device_train_batch_size
        if isinstance(data, IterableDatasetShard):
            data = data.dataset
        self._refuse_rows_of(data)
        if isinstance(data, IterableDataset):
            rows = list(data.take(most))
        else:
            count = min(most, len(data))
            rows = [data[index * len(data) // count] for index in range(count)]
        return [collate(rows[start : start + size]) for start in range(0, len(rows), size)]

    def _calibration_forward(self, batch) -> None:
        inputs = self._prepare_inputs(batch)
        with self.compute_loss_context_manager():
            self.compute_loss(self.model, inputs)


def _prune_alike(weight: torch.Tensor, moments: torch.Tensor, pattern: SparsityPattern) -> torch.Tensor:
    """Layer-wise ADMM, to the same bits on every process: those of the first."""
    pruned = prune_layer(weight, moments, pattern).contiguous()
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        distributed.broadcast(pruned, 0)
    return pruned

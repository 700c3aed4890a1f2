"""When a run prunes by what its data put into the layers: at the switch, with some rows of the training set."""

from collections.abc import Mapping
from functools import partial

import torch
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

    The rows lie evenly over the training set and go through the trainer's collator and `compute_loss`, in evaluation
    mode, on every process alike. They draw no random number, and change nothing but the weights.
    """

    def _check_calibration(self) -> None:
        if self.args.is_sparse and self.args.num_calibration_samples and (message := self._no_calibration()):
            raise ValueError(
                f"num_calibration_samples={self.args.num_calibration_samples}: {message}. Set it to 0, and prune "
                "before training with prune_one_shot if you like."
            )

    def _no_calibration(self) -> str | None:
        """Why the training data can't be used, if so."""
        data = self.train_dataset
        if data is None:
            return "there is no train_dataset to take rows of"
        if not (isinstance(data, IterableDataset) or (hasattr(data, "__getitem__") and hasattr(data, "__len__"))):
            return f"rows of the train_dataset, a {type(data).__name__}, can't be looked up"
        if isinstance(data, Mapping):
            return "train_dataset is several data sets"
        return None

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

    def _calibration_batches(self) -> list[Mapping]:
        data, collate, most = self.train_dataset, self.data_collator, self.args.calibration_samples
        if isinstance(data, IterableDataset):
            rows = list(self._remove_unused_columns(data.take(most), description="training"))
        else:
            if hasattr(data, "column_names"):
                data = self._remove_unused_columns(data, description="training")
            else:
                collate = self._get_collator_with_removed_columns(collate, description="training")
            count = min(most, len(data))
            rows = [data[index * len(data) // count] for index in range(count)]
        size = self.args.per_device_train_batch_size
        return [collate(rows[start : start + size]) for start in range(0, len(rows), size)]

    def _calibration_forward(self, batch: Mapping) -> None:
        inputs = self._prepare_inputs(batch)
        with self.compute_loss_context_manager():
            self.compute_loss(self.model, inputs)


def _prune_alike(weight: torch.Tensor, moments: torch.Tensor, pattern: SparsityPattern) -> torch.Tensor:
    """Layer-wise ADMM, to the same bits on every process: those of the first."""
    pruned = prune_layer(weight, moments, pattern).contiguous()
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        distributed.broadcast(pruned, 0)
    return pruned

"""When a run prunes by what its data put into the layers: at the switch, with some rows of the training set."""

from collections.abc import Mapping
from functools import partial

import torch
from accelerate.data_loader import IterableDatasetShard
from accelerate.utils.memory import should_reduce_batch_size
from datasets import IterableDataset
from torch import distributed
from transformers import PreTrainedModel

from hf_admm.console import get_logger
from hf_admm.pruning.calibration import evenly, prune_in_blocks
from hf_admm.pruning.defaults import CALIBRATION_TOKENS
from hf_admm.pruning.layerwise import prune_layer
from hf_admm.pruning.weights import PrunedWeights
from hf_admm.sparsity.patterns import SparsityPattern
from hf_admm.training.traceless import as_it_was, same_randomness


logger = get_logger(__name__)

TWO_PHASES_INSTEAD = (
    "With num_calibration_samples=0 the run has two phases instead; prune_one_shot prunes before training with data "
    "of your own."
)


class CalibrationMixin:
    """
    The part of [`ADMMTrainerMixin`] that prunes by layer-wise ADMM at the switch to phase 2, or before the first step
    where there is no phase 1.

    The rows lie evenly over the data of the training's own data loader (of a stream, they are its first). They go
    through its collator and the trainer's `compute_loss`, in evaluation mode, on every process alike. They draw no
    random number; the trainer, the logs, and the model but for its weights stay as they are.
    """

    _calibrating = False

    def _check_calibration(self, says: bool = False) -> None:
        """Where it is the default and can't be done, the run has two phases instead."""
        args, data = self.args, self.train_dataset
        args.can_not_calibrate = False
        if not args.calibration_samples:
            return
        if args.num_calibration_samples is not None:
            if data is not None:  # else the data loader is the user's own
                self._refuse_rows_of(data)
            return
        try:
            self._refuse_rows_of(data)
        except ValueError as error:
            args.can_not_calibrate = True
            if says:
                reason = str(error).replace(TWO_PHASES_INSTEAD, "").strip()
                logger.warning(
                    f"By default, a model is pruned to {args.pattern} by its data. This run has two phases instead: "
                    f"{reason} prune_one_shot prunes before training with data of your own."
                )

    def _refuse_rows_of(self, data) -> None:
        if isinstance(data, IterableDataset):
            return
        stream = isinstance(data, torch.utils.data.IterableDataset)
        if isinstance(data, Mapping) or stream or not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
            reason = f"The training data ({type(data).__name__}) has no rows that can be looked up"
            if data is None:
                reason = "There is no train_dataset"
            elif isinstance(data, Mapping):
                reason = f"The training data ({type(data).__name__}) are several data sets"
            raise ValueError(f"{reason}. {TWO_PHASES_INSTEAD}")

    def _rehearse(self) -> None:
        """
        Sends a batch through the model as [`CalibrationMixin._calibrate`] will: what can't be done is said before
        half of a run is over.
        """
        with as_it_was(self.model, self), same_randomness(self.model, self.args.device), torch.no_grad():
            self._calibrating = True
            self.model.eval()
            self._calibration_forward(self._calibration_batches(self._calibration_batch_size)[0])

    def _calibrate(self, weights: PrunedWeights) -> dict[str, float]:
        """Prunes the weights, and returns how much of each layer's output was changed, by the name of the weight."""
        if weights.obey():
            logger.info(f"The model obeys {weights.pattern} already: its zeros stay.")
            return {}
        self._warn_of_scratch()
        if self.args.auto_find_batch_size:  # with less memory left from here on, a smaller one may begin anew
            weights.remember()
        logger.info(f"Layer-wise ADMM with up to {self.args.calibration_samples} rows of the training set.")
        with as_it_was(self.model, self), same_randomness(self.model, self.args.device):
            self._calibrating = True
            errors = prune_in_blocks(
                weights,
                self._calibration_batches(self.args.calibration_samples),
                partial(self._prune_layer, pattern=weights.pattern),
                self._calibration_forward,
                leaves_unreached=True,
                enough=CALIBRATION_TOKENS if self.args.num_calibration_samples is None else None,
            )
        if left := [name for name in weights.targets if name not in errors]:
            logger.warning(
                f"The calibration rows do not reach the forward of these layers, whose mask is that of their weights' "
                f"size: {', '.join(left)}. Parts of nn.MultiheadAttention and unused experts are such."
            )
        return errors

    def _warn_of_scratch(self) -> None:
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        asked_for = self.args.num_calibration_samples is not None or self.state.global_step
        if isinstance(model, PreTrainedModel) and not asked_for and not model.config.name_or_path:
            logger.warning(
                f"{type(model).__name__} is pruned by its data before it trains, as is the default, and it was not "
                "loaded by from_pretrained. If it starts from random weights, it has learnt nothing yet that pruning "
                "could keep: set admm_steps=0.6, and the zeros are found while it trains."
            )

    def _prune_layer(self, weight: torch.Tensor, moments: torch.Tensor, pattern: SparsityPattern) -> torch.Tensor:
        """Layer-wise ADMM, to the same bits on every process: those of the first."""
        pruned = prune_layer(weight, moments, pattern).contiguous()
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            distributed.broadcast(pruned, 0)
        return pruned

    @property
    def _calibration_batch_size(self) -> int:
        return max(1, self._train_batch_size // max(1, self.args.n_gpu))  # the one in force, if one is searched for

    def _calibration_batches(self, most: int) -> list:
        """At most that many rows, in batches, or where the data are batches already, about so many of their rows."""
        loader, size = self.callback_handler.train_dataloader, self._calibration_batch_size
        # A loader of the user's own may have neither.
        data = getattr(loader, "dataset", self.train_dataset)
        collate = getattr(loader, "collate_fn", self.data_collator)
        if isinstance(data, IterableDatasetShard):
            data = data.dataset
        self._refuse_rows_of(data)
        holds_batches = getattr(loader, "batch_sampler", loader) is None
        most = -(-most // size) if holds_batches else most
        if isinstance(data, IterableDataset):
            rows = list(data.take(most))
        else:
            rows = [self._row(data, place) for place in evenly(most, len(data))]
        if holds_batches:
            return [collate(row) for row in rows]
        parts = [rows[start : start + size] for start in range(0, len(rows), size)]
        if self.args.dataloader_drop_last and len(parts) > 1 and len(parts[-1]) < size:
            parts.pop()
        return [collate(part) for part in parts]

    def _row(self, data, place: int):
        try:
            return data[place]
        except Exception as error:
            raise ValueError(
                f"Row {place} of the training data ({type(data).__name__}) can't be looked up by its number: "
                f"{type(error).__name__}: {error}. {TWO_PHASES_INSTEAD}"
            ) from error

    def _calibration_forward(self, batch) -> None:
        """Only the passes through the model count: some models and trainers have no loss in evaluation mode."""
        passed = []
        hook = self.model.register_forward_hook(lambda *_: passed.append(True))
        try:
            with self.compute_loss_context_manager():
                self.compute_loss(self.model, self._prepare_inputs(batch))
        except Exception as error:
            if should_reduce_batch_size(error):
                raise
            if not passed:
                logger.error(
                    f"Rows of the training set are to show what to prune, and {type(self).__name__} failed on them in "
                    f"evaluation mode, before it called the model. {TWO_PHASES_INSTEAD}"
                )
                raise
        finally:
            hook.remove()

    def log(self, *args, **kwargs) -> None:
        if not self._calibrating:
            super().log(*args, **kwargs)

"""What the trainer saves and loads: sparse weights that load anywhere, and beside them what an exact resume needs."""

import os
import re
import shutil
from contextlib import contextmanager, nullcontext
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from hf_admm.checkpoints.files import RECORD_NAME
from hf_admm.checkpoints.records import find_weights, save_records, without_records
from hf_admm.checkpoints.saved_names import load_renamed
from hf_admm.checkpoints.sidecar import check_sidecar, has_sidecar, load_sidecar, save_sidecar
from hf_admm.checkpoints.staging import STAGING_NAME, checkpoint_name, clean_up, discard, publish, publish_rest, rotate
from hf_admm.checkpoints.state_dict_types import as_saved, saves_shards, whole
from hf_admm.console import get_logger
from hf_admm.pruning.phases import Finished
from hf_admm.training.signatures import GivenArguments, surround


logger = get_logger(__name__)


class SparseCheckpointsMixin:
    """
    The part of [`ADMMTrainerMixin`] that overrides how `Trainer` saves and loads.

    `model.safetensors` of every save holds weights that obey the pattern, in both phases; the dense working weights
    live in the sidecar. A checkpoint is written beside its place and renamed when it is complete.
    """

    _staging = False  # Trainer writes a checkpoint beside its place
    _whole_checkpoint = False  # something else writes one, with all that a resume needs
    _loads = _loads_best = False  # within these, however many methods call each other
    _saves: dict[Path, dict] | None = None  # the folders of a save, with the weights that were there before
    _owed: set[Path] | None = None  # the folders that a sidecar is due in, when the save is over
    last_checkpoint: Path | None = None  # that this training saved, or went on from
    resumed_from: Path | None = None

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        surround(cls, SparseCheckpointsMixin, _AROUND)

    def train(self, *args, **kwargs):
        self.last_checkpoint = self.resumed_from = None
        given = GivenArguments(type(self), SparseCheckpointsMixin, "train", args, kwargs)
        if self.args.is_sparse:
            run_dir = Path(self.args.output_dir)
            empty = clean_up(run_dir) if self.args.should_save else []
            self.accelerator.wait_for_everyone()  # before anyone looks for the last checkpoint
            start = given.get("resume_from_checkpoint")
            if isinstance(start, str | os.PathLike) and Path(start) in empty:
                last = get_last_checkpoint(run_dir)
                given.put("resume_from_checkpoint", last)
                logger.warning(f"{start} was never written. Resuming from {last or 'the start'}.")
        return super().train(*given.args, **given.kwargs)

    # ---- Save ----

    def _save_checkpoint(self, *args, **kwargs) -> None:
        if not self.args.is_sparse:
            return super()._save_checkpoint(*args, **kwargs)
        with self.sparsity.sparse_weights():
            self._save_whole(*args, **kwargs)

    def _save_whole(self, *args, **kwargs) -> None:
        given = GivenArguments(type(self), SparseCheckpointsMixin, "_save_checkpoint", args, kwargs)
        trial = given.get("trial")
        run_dir = Path(self._get_output_dir(trial))
        final = run_dir / checkpoint_name(self.state.global_step)
        staged = run_dir / STAGING_NAME / final.name
        if self.args.should_save:
            discard(staged)  # of an earlier run
        self.accelerator.wait_for_everyone()
        self._staging = True
        try:
            with self._checkpointing(), self._paying():
                super()._save_checkpoint(*args, **kwargs)
            if self.state.best_global_step:  # Trainer looked for it in the staging folder
                best = run_dir / checkpoint_name(self.state.best_global_step)
                if best == final or best.is_dir():
                    self.state.best_model_checkpoint = str(best)
                if self.args.should_save and staged.is_dir():
                    self.state.save_to_json(str(staged / TRAINER_STATE_NAME))
        except BaseException as error:
            if self.args.should_save:
                discard(staged)
                logger.error(
                    f"{final.name} could not be written to {run_dir} ({type(error).__name__}: {error}). What there "
                    "was of it is removed; the checkpoints before it are complete."
                )
            raise
        finally:
            self._staging = False
        self.accelerator.wait_for_everyone()  # every process has written its part
        if self.args.should_save:
            publish(staged, final)
            publish_rest(run_dir)
        self.accelerator.wait_for_everyone()
        if self.args.local_process_index == 0 and not final.exists():  # another node, with a disk of its own
            publish(staged, final)
        self.last_checkpoint = final
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            rotate(run_dir, self.args.save_total_limit, [final, *([Path(best)] if best else [])])

    def _tune_save_checkpoint(self, *args, **kwargs) -> None:
        with self._tuning():
            super()._tune_save_checkpoint(*args, **kwargs)

    def _get_output_dir(self, *args, **kwargs) -> str:
        run_dir = super()._get_output_dir(*args, **kwargs)
        return os.path.join(run_dir, STAGING_NAME) if self._staging else run_dir

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._staging:  # uploads run in the background, so the folder must have its name already
            record = Path(checkpoint_folder) / RECORD_NAME
            if self.args.should_save and record.is_file():  # Trainer copies a fixed list of files
                shutil.copy(record, self.args.output_dir)
            super()._push_from_checkpoint(checkpoint_folder)

    def save_model(self, *args, **kwargs) -> None:
        with self._saving(*args, **kwargs):
            super().save_model(*args, **kwargs)

    def _save(self, *args, **kwargs) -> None:
        with self._saving_files(*args, **kwargs):
            super()._save(*args, **kwargs)

    def _save_optimizer_and_scheduler(self, *args, **kwargs) -> None:
        with self._saving_optimizer(*args, **kwargs):
            super()._save_optimizer_and_scheduler(*args, **kwargs)

    @contextmanager
    def _checkpointing(self, *_, whole: bool | None = None, **__):
        before = self._whole_checkpoint
        self._whole_checkpoint = not self.args.save_only_model if whole is None else whole
        try:
            yield
        finally:
            self._whole_checkpoint = before

    def _tuning(self, *_, **__):
        return self._checkpointing(whole=True)

    @contextmanager
    def _saving(self, *args, **kwargs):
        """Around what saves a model. Where it is part of a checkpoint, the sidecar is part of it too."""
        folder = self._saved_folder(args, kwargs)
        named = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", folder.name) and not self.args.save_only_model
        with self._paying():
            due = len(self._owed)
            if self._whole_checkpoint and self._in_shards:
                yield  # nothing is saved: the shards of the model come with those of the optimizer
            else:
                with whole(self.accelerator) if self._in_shards else nullcontext(), self._saving_files(folder):
                    yield
            # An overridden method may have handed on another folder, which has its sidecar then.
            if (self._whole_checkpoint or named) and len(self._owed) == due:
                self._owed.add(folder)

    @contextmanager
    def _saving_files(self, *args, **kwargs):
        """Around what writes the files of a model: the weights are sparse, and recorded as such."""
        if not self.sparsity.targets:
            with without_records(self._saved_folder(args, kwargs), self.args.should_save):
                yield
            return
        folder, outermost = self._saved_folder(args, kwargs), self._saves is None
        self._saves = self._saves or {}
        if self.args.should_save:
            self._saves.setdefault(folder, find_weights(folder))
        if not outermost:
            yield
            return
        try:
            with self.sparsity.sparse_weights():
                yield
                if self.args.should_save:
                    model, state = self.accelerator.unwrap_model(self.model), self.sparsity
                    save_records(model, state.weights, self._saves)
        finally:
            self._saves = None

    @contextmanager
    def _saving_optimizer(self, *args, **kwargs):
        with self._paying():
            # Under FSDP, Trainer saves the model once more here, and loads the best model from that file.
            folder = self._saved_folder(args, kwargs)
            with self._saving_files(folder) if self._in_shards else self.sparsity.sparse_weights():
                yield
            self._owed.add(folder)

    @contextmanager
    def _paying(self):
        """Writes the sidecars when the outermost of the saves is over."""
        if self._owed is not None:
            yield
            return
        self._owed = set()
        try:
            yield
            if self.sparsity.phase.prunes and self._owed:
                write, sharded = self.args.should_save, self._in_shards
                with self.sparsity.sparse_weights():  # what an optimizer that swaps weights trains with is aside then
                    for folder in sorted(self._owed):
                        save_sidecar(self.sparsity, folder, write, sharded)
        finally:
            self._owed = None

    @property
    def _in_shards(self) -> bool:
        """Whether checkpoints are written in shards. A dense run is plain Trainer, whatever it does."""
        return self.args.is_sparse and saves_shards(self.accelerator)

    def _as_saved(self, checkpoint):
        return as_saved(self.accelerator, checkpoint) if self.args.is_sparse and checkpoint else nullcontext()

    def _saved_folder(self, args: tuple, kwargs: dict) -> Path:
        folder = kwargs.get("output_dir", args[0] if args else None)
        return Path(self.args.output_dir if folder is None else folder)

    # ---- Load ----

    def _load_from_checkpoint(self, *args, **kwargs) -> None:
        # Of any trainer, with the model or without.
        checkpoint = GivenArguments(type(self), SparseCheckpointsMixin, "_load_from_checkpoint", args, kwargs).first()
        if os.path.isdir(checkpoint) and not self._loads_best:  # else Trainer's own message is the better one
            targets = self.select_targets().targets if self.args.is_sparse else {}
            if has_sidecar(checkpoint, self.args.pattern, targets):
                check_sidecar(checkpoint, self.args.pattern, targets)
        if not self._load_renamed(checkpoint):
            with self._as_saved(checkpoint):
                super()._load_from_checkpoint(*args, **kwargs)

    def _load_optimizer_and_scheduler(self, *args, **kwargs) -> None:
        with self._loading_optimizer(*args, **kwargs):
            super()._load_optimizer_and_scheduler(*args, **kwargs)

    @contextmanager
    def _loading_optimizer(self, *args, **kwargs):
        """Around the last thing that a resume loads."""
        outermost, self._loads = not self._loads, True
        checkpoint = kwargs.get("checkpoint", args[0] if args else None)
        try:
            with self._as_saved(checkpoint):
                yield
        finally:
            self._loads = not outermost
        if outermost and checkpoint is not None and self.args.is_sparse:
            self.last_checkpoint = self.resumed_from = Path(checkpoint)
            selection = self.select_targets()
            if not has_sidecar(checkpoint, self.args.pattern, selection.targets):
                return
            self.sparsity.reset(self.model, self.args.pattern, selection)
            self.sparsity.use_optimizer(self.optimizer)
            load_sidecar(self.sparsity, checkpoint, self.args.phase_settings(self.state.max_steps))

    def _load_renamed(self, checkpoint: str) -> bool:
        # A dense run is plain Trainer, bit for bit. FSDP loads a file of its own, under the parameters' names.
        sparse = self.args.is_sparse and not self.is_fsdp_enabled
        return sparse and load_renamed(self.accelerator.unwrap_model(self.model), checkpoint)

    def _load_best_model(self, *args, **kwargs) -> None:
        with self._loading_best_model():
            if not self._load_renamed(self.state.best_model_checkpoint):
                super()._load_best_model(*args, **kwargs)

    @contextmanager
    def _loading_best_model(self, *_, **__):
        """Around what loads the best model, whose weights are sparse already, with a mask of their own."""
        self.sparsity.restore_dense()
        self.sparsity.swapped.averages()
        before, self._loads_best = self._loads_best, True
        try:
            with self._as_saved(self.state.best_model_checkpoint):
                yield
        finally:
            self._loads_best = before
        # If its file is gone, Trainer warns and goes on with the last weights: `on_train_end` prunes those.
        if self.sparsity.phase.prunes and self.sparsity.weights.obey():
            self.sparsity.phase = Finished(self.sparsity.weights)
            self._warn_of_dense_best()
        best, last = Path(self.state.best_model_checkpoint), self.last_checkpoint
        # Trainer is about to delete the others, file by file. The best may lie in the folder of another run.
        if self.args.is_sparse and self.args.should_save and self.args.save_total_limit == 1:
            if last is not None and last.parent == best.parent == Path(self._get_output_dir(self._trial)):
                rotate(best.parent, 1, [best])

    def _warn_of_dense_best(self) -> None:
        """A dense model that is cut at once may beat by its loss what has overfitted since, or by chance."""
        step, switch = self.state.best_global_step, self.args.phase_plan(self.state.max_steps).admm_steps
        if step is not None and 0 < step <= switch and not self.args.rho:
            logger.warning(
                f"The best model is that of step {step}, in the dense phase, which has {switch}: the projection of "
                "dense weights, not trained with its zeros. Let evaluations begin after it (eval_delay), judge by "
                "another metric_for_best_model than the loss, or leave load_best_model_at_end away."
            )


# What surrounds the methods of Trainer that subclasses override, and may override without `super()`.
_AROUND = {
    "save_model": "_saving",
    "_save": "_saving_files",
    "_save_checkpoint": "_checkpointing",
    "_tune_save_checkpoint": "_tuning",
    "_save_optimizer_and_scheduler": "_saving_optimizer",
    "_load_optimizer_and_scheduler": "_loading_optimizer",
    "_load_best_model": "_loading_best_model",
}

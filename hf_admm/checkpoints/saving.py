"""What the trainer saves and loads: sparse weights that load anywhere, and beside them what an exact resume needs."""

import json
import os
import shutil
from pathlib import Path

from torch import nn
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from hf_admm.checkpoints.files import RECORD_NAME, RECORD_VERSION
from hf_admm.checkpoints.saved_names import load_renamed, saved_names
from hf_admm.checkpoints.sidecar import check_sidecar, load_sidecar, save_sidecar
from hf_admm.checkpoints.staging import STAGING_NAME, checkpoint_name, clean_up, discard, publish, rotate
from hf_admm.pruning.phases import Finished
from hf_admm.version import __version__


logger = logging.get_logger(__name__)


class SparseCheckpointsMixin:
    """
    The part of [`ADMMTrainerMixin`] that overrides how `Trainer` saves and loads.

    `model.safetensors` of every save holds weights that obey the pattern, in both phases; the dense working weights
    live in the sidecar. A checkpoint is written beside its place and renamed when it is complete.
    """

    _staging = False
    last_checkpoint: Path | None = None  # that this training saved, or went on from

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        self.last_checkpoint = None
        if self.args.is_sparse:
            run_dir = Path(self.args.output_dir)
            empty = clean_up(run_dir) if self.args.should_save else []
            self.accelerator.wait_for_everyone()  # before anyone looks for the last checkpoint
            if isinstance(resume_from_checkpoint, str | os.PathLike) and Path(resume_from_checkpoint) in empty:
                given, resume_from_checkpoint = resume_from_checkpoint, get_last_checkpoint(run_dir)
                logger.warning(f"{given} was never written. Resuming from {resume_from_checkpoint or 'the start'}.")
        return super().train(resume_from_checkpoint, *args, **kwargs)

    # ---- Save ----

    def _save_checkpoint(self, model, trial) -> None:
        if not self.args.is_sparse:
            return super()._save_checkpoint(model, trial)
        with self.sparsity.sparse_weights():
            self._save_whole(model, trial)

    def _save_whole(self, model, trial) -> None:
        run_dir = Path(self._get_output_dir(trial))
        final = run_dir / checkpoint_name(self.state.global_step)
        staged = run_dir / STAGING_NAME / final.name
        if self.args.should_save:
            discard(staged)  # of an earlier run
        self.accelerator.wait_for_everyone()
        self._staging = True
        try:
            super()._save_checkpoint(model, trial)
            if self.state.best_global_step:  # Trainer looked for it in the staging folder
                best = run_dir / checkpoint_name(self.state.best_global_step)
                if best == final or best.is_dir():
                    self.state.best_model_checkpoint = str(best)
                if self.args.should_save:
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
        self.accelerator.wait_for_everyone()
        if self.args.local_process_index == 0 and not final.exists():  # another node, with a disk of its own
            publish(staged, final)
        self.last_checkpoint = final
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            rotate(run_dir, self.args.save_total_limit, [final, *([Path(best)] if best else [])])

    def _get_output_dir(self, trial) -> str:
        run_dir = super()._get_output_dir(trial)
        return os.path.join(run_dir, STAGING_NAME) if self._staging else run_dir

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._staging:  # uploads run in the background, so the folder must have its name already
            record = Path(checkpoint_folder) / RECORD_NAME
            if self.args.should_save and record.is_file():  # Trainer copies a fixed list of files
                shutil.copy(record, self.args.output_dir)
            super()._push_from_checkpoint(checkpoint_folder)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        with self.sparsity.sparse_weights():
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save and self.sparsity.targets:
            self._save_record(Path(output_dir if output_dir is not None else self.args.output_dir))

    def _save_record(self, folder: Path) -> None:
        """What `hf-admm verify` checks against; nothing needs it to load the model."""
        # The few that are saved fused with others are left to verify, which judges them by their zeros.
        weights = self.sparsity.weights
        keys = saved_names(self.accelerator.unwrap_model(self.model), weights.parameters, folder)
        record = {
            "format_version": RECORD_VERSION,
            "hf_admm_version": __version__,
            "pattern": str(weights.pattern),
            "targets": {key: {"transposed": weights.targets[name].transposed} for name, key in keys.items()},
        }
        temporary = folder / f"{RECORD_NAME}.tmp"
        temporary.write_text(json.dumps(record, indent=2) + "\n")
        os.replace(temporary, folder / RECORD_NAME)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        # Under FSDP, Trainer saves the model once more here, and loads the best model from that file.
        with self.sparsity.sparse_weights():
            super()._save_optimizer_and_scheduler(output_dir)
            if self.sparsity.phase.prunes:
                save_sidecar(self.sparsity, output_dir, write=self.args.should_save)

    # ---- Load ----

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if os.path.isdir(resume_from_checkpoint):  # else Trainer's own message is the better one
            targets = self.select_targets().targets if self.args.is_sparse else {}
            check_sidecar(resume_from_checkpoint, self.args.pattern, targets)
        if not self._load_renamed(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.args.is_sparse:
            self.last_checkpoint = Path(checkpoint)
            self.sparsity.reset(self.model, self.args.pattern, self.select_targets())
            self.sparsity.use_optimizer(self.optimizer)
            load_sidecar(self.sparsity, checkpoint, self.args.phase_settings(self.state.max_steps))

    def _load_renamed(self, checkpoint: str) -> bool:
        # A dense run is plain Trainer, bit for bit. FSDP loads a file of its own, under the parameters' names.
        sparse = self.args.is_sparse and not self.is_fsdp_enabled
        return sparse and load_renamed(self.accelerator.unwrap_model(self.model), checkpoint)

    def _load_best_model(self) -> None:
        # Its weights are sparse already, with a mask of their own.
        self.sparsity.restore_dense()
        self.sparsity.swapped.averages()
        if not self._load_renamed(self.state.best_model_checkpoint):
            super()._load_best_model()
        # If its file is gone, Trainer warns and goes on with the last weights: `on_train_end` prunes those.
        if self.sparsity.phase.prunes and self.sparsity.weights.obey():
            self.sparsity.phase = Finished(self.sparsity.weights)
        best, last = Path(self.state.best_model_checkpoint), self.last_checkpoint
        # Trainer is about to delete the others, file by file. The best may lie in the folder of another run.
        if self.args.is_sparse and self.args.should_save and self.args.save_total_limit == 1:
            if last is not None and last.parent == best.parent == Path(self._get_output_dir(self._trial)):
                rotate(best.parent, 1, [best])

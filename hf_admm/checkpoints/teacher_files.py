"""What a resume needs to have the same teacher: a record in each checkpoint, and once the weights of the run's own.

What the model was at its start, or at the switch, is nowhere else afterwards, so the first checkpoint has it written
beside it.
The underscore keeps it out of uploads to the hub.
"""

import json
import os
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_model, save_model

from hf_admm.checkpoints.files import UNREADABLE, sync
from hf_admm.checkpoints.sidecar import checksum
from hf_admm.checkpoints.staging import STAGING_NAME
from hf_admm.console import get_logger
from hf_admm.training.distillation_arguments import OWN, SELF
from hf_admm.training.signatures import surround
from hf_admm.training.teaching import DistillationMixin


logger = get_logger(__name__)

TEACHER_RECORD = "distill_teacher.json"
TEACHER_WEIGHTS = "_distill_teacher.safetensors"
SWITCH_WEIGHTS = "_distill_teacher_switch.safetensors"
_VERSION = 1


class TeacherCheckpointsMixin(DistillationMixin):
    """The part of [`ADMMTrainerMixin`] that has a resumed run learn from the teacher that it began with."""

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        around = {"_save_optimizer_and_scheduler": "_saving_teacher"}
        around |= {"_load_optimizer_and_scheduler": "_loading_teacher"}
        surround(cls, TeacherCheckpointsMixin, around)

    def _prepare_teacher(self) -> None:
        self._teacher_sum, self._teacher_places = None, set()
        super()._prepare_teacher()

    def _take_teacher(self) -> None:
        if self.args.learns_from_switch:
            self._teacher_sum, self._teacher_places = None, set()
        super()._take_teacher()

    def _save_optimizer_and_scheduler(self, *args, **kwargs) -> None:
        with self._saving_teacher(*args, **kwargs):
            super()._save_optimizer_and_scheduler(*args, **kwargs)

    def _load_optimizer_and_scheduler(self, *args, **kwargs) -> None:
        with self._loading_teacher(*args, **kwargs):
            super()._load_optimizer_and_scheduler(*args, **kwargs)

    @contextmanager
    def _saving_teacher(self, *args, **kwargs):
        """Around the one thing that every checkpoint saves which can be resumed."""
        yield
        if not self._has_teacher or not self.args.should_save:
            return
        folder = Path(kwargs.get("output_dir", args[0] if args else self.args.output_dir))
        run_dir = folder.parent.parent if folder.parent.name == STAGING_NAME else folder.parent
        if self.args.distill_teacher in OWN and run_dir not in self._teacher_places:
            self._save_self(run_dir)
        record = {"format_version": _VERSION, "teacher": self.args.distill_teacher, "crc32": self._checksum()}
        (folder / TEACHER_RECORD).write_text(json.dumps(record), encoding="utf-8")

    @property
    def _teacher_weights(self) -> str:
        return SWITCH_WEIGHTS if self.args.learns_from_switch else TEACHER_WEIGHTS

    def _save_self(self, run_dir: Path) -> None:
        temporary = run_dir / STAGING_NAME / self._teacher_weights
        temporary.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_model(self._teacher, str(temporary), metadata={"format": "pt"})
            sync(temporary)
            os.replace(temporary, run_dir / self._teacher_weights)
            sync(run_dir)
        finally:
            temporary.unlink(missing_ok=True)
            with suppress(OSError):  # a checkpoint is being written there
                temporary.parent.rmdir()
        self._teacher_places.add(run_dir)

    @contextmanager
    def _loading_teacher(self, *args, **kwargs):
        checkpoint = kwargs.get("checkpoint", args[0] if args else None)
        if checkpoint is not None:
            self._find_teacher(Path(checkpoint))
        yield

    def _find_teacher(self, checkpoint: Path) -> None:
        record = _read_record(checkpoint)
        teacher = self.args.distill_teacher
        if teacher is None:
            if record is not None:
                logger.warning(
                    f"{checkpoint} had {record['teacher']!r} as its teacher, and goes on without one. To "
                    "go on with it, set distill_teacher to it again."
                )
            return
        if self.args.learns_from_switch and record is None:
            return  # it is still to come
        if self.args.learns_from_switch and record["teacher"] != teacher:
            raise ValueError(
                f"distill_teacher={teacher!r} is not the teacher of {checkpoint}, {record['teacher']!r}. Give that "
                f"one, or start a new run; to change the teacher in phase 1 all the same, delete {TEACHER_RECORD} "
                "there."
            )
        if teacher in OWN:
            self._load_self(checkpoint)
        if record is None:
            logger.warning(
                f"{checkpoint} was trained without a teacher; from here on there is {teacher!r}. To go on as before, "
                "leave distill_teacher away."
            )
        elif record["crc32"] != self._checksum():
            remedy = "Resume from phase 1, or start a new run."
            if not self.args.learns_from_switch:
                remedy = "Give that one, or start a new run; to change the teacher all the same, delete "
                remedy += f"{TEACHER_RECORD} there."
            raise ValueError(
                f"distill_teacher={teacher!r} has other weights than the teacher of {checkpoint}, "
                f"{record['teacher']!r}. {remedy}"
            )

    def _load_self(self, checkpoint: Path) -> None:
        places = (checkpoint.parent, Path(self.args.output_dir))
        place = next((place for place in places if (place / self._teacher_weights).is_file()), None)
        if place is None:
            given = self.args.distill_teacher
            moment = "when training started" if given == SELF else "at the switch"
            raise ValueError(
                f"distill_teacher={given!r} is the dense model as it was {moment}, and {checkpoint} has it "
                f"no longer: {self._teacher_weights} is missing beside it. Copy it there, or give the folder of that "
                "model as distill_teacher."
            )
        try:
            load_model(self._teacher, str(place / self._teacher_weights))
        except (SafetensorError, OSError, RuntimeError) as error:
            raise ValueError(
                f"{place / self._teacher_weights} is not a state of this model ({error}). Copy it again, or give the "
                "folder of that model as distill_teacher."
            ) from error
        self._teacher_sum, self._teacher_taken = None, True
        self._teacher_places.add(place)

    def _checksum(self) -> str:
        if self._teacher_sum is None:
            self._teacher_sum = checksum("", sorted(self._teacher.state_dict().items()))
        return self._teacher_sum


def _read_record(checkpoint: Path) -> dict | None:
    file = checkpoint / TEACHER_RECORD
    if not file.is_file():
        return None
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        if record["format_version"] != _VERSION:
            raise ValueError(f"format {record['format_version']} is not known")
        return {name: str(record[name]) for name in ("teacher", "crc32")}
    except UNREADABLE as error:
        raise ValueError(f"{file} is damaged ({error}). Copy the checkpoint again.") from error

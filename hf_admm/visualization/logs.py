"""What a run logged, from the `trainer_state.json` that Trainer leaves."""

import json
import math
from dataclasses import dataclass
from numbers import Real
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from hf_admm.checkpoints.files import UNREADABLE


_TIMES = ("runtime", "samples_per_second", "steps_per_second", "preparation_time")


@dataclass(frozen=True)
class RunLogs:
    """
    The logs of a run.

    Args:
        entries (`list[dict]`):
            What was logged, in its order, each with its `step`.
        switch (`int`, *optional*):
            The number of steps of phase 1, if the run says so.
    """

    entries: list[dict]
    switch: int | None = None

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """
        A figure over the run.

        Args:
            name (`str`):
                Its name in the logs.

        Returns:
            `tuple[list[int], list[float]]`: The steps, and its values there. What is not finite is left out.
        """
        found = [(entry["step"], entry[name]) for entry in self.entries if name in entry and "step" in entry]
        found = [(step, float(value)) for step, value in found if _is_number(value)]
        return [step for step, _ in found], [value for _, value in found]

    @property
    def last_step(self) -> int:
        """The last step that something was logged at, 0 if nothing was."""
        return max((entry.get("step", 0) for entry in self.entries), default=0)

    @property
    def switch_step(self) -> int | None:
        """The last step of phase 1: as the run says, else the last one logged in phase 1 if phase 2 was logged too."""
        steps, phases = self.series("admm/phase")
        first = [step for step, phase in zip(steps, phases, strict=True) if phase == 1]
        if 2 not in phases or not (first or self.switch):
            return None
        return self.switch or max(first)

    @property
    def metrics(self) -> list[str]:
        """Names of what evaluations measured, the loss last."""
        names = dict.fromkeys(name for entry in self.entries for name in entry if name.startswith("eval_"))
        names = [name for name in names if not name.endswith(_TIMES) and self.series(name)[0]]
        return sorted(names, key=lambda name: name.endswith("loss"))


def _is_number(value) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def read_logs(run_dir: Path) -> list[dict] | None:
    """
    Reads the logs of a run, from its folder or from its last checkpoint.

    Args:
        run_dir (`Path`):
            The folder of the run, or of a checkpoint.

    Returns:
        `list[dict]`: The entries; `None` if there are none.

    Raises:
        `ValueError`: If the file is damaged.
    """
    checkpoint = get_last_checkpoint(str(run_dir))
    folders = [run_dir, *([Path(checkpoint)] if checkpoint else [])]
    file = next((folder / TRAINER_STATE_NAME for folder in folders if (folder / TRAINER_STATE_NAME).is_file()), None)
    if file is None:
        return None
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))["log_history"]
        return [dict(entry) for entry in entries]
    except UNREADABLE as error:
        raise ValueError(
            f"{file} is damaged ({type(error).__name__}: {error}). Remove it to make the report without the logs."
        ) from error

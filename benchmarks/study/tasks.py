"""The tasks of the study: their data, and what a fine-tuning of each is set to."""

from dataclasses import dataclass, replace

from datasets import Dataset

from hf_admm.commands.glue import glue_task
from hf_admm.finetuning.tasks import TextTask


DEFAULT_TASKS = ("cola", "mrpc", "sst2")

TRAIN_ROWS = 16_000  # of a larger task
TUNING_ROWS = 10_000  # of those that are left then
FURTHER_ROWS = 20_000  # of those that are left then
HELD_OUT = 0.15  # of a smaller task
_SEED = 0  # of the draws: the same rows in every run, whatever its seed


@dataclass(frozen=True)
class Recipe:
    """
    What is particular to a task, whatever the method.

    Args:
        epochs (`float`), max_seq_length (`int`), learning_rate (`float`), batch_size (`int`), warmup (`float`):
            Of the fine-tuning. The learning rate is that of phase 1, or of the whole run.
    """

    epochs: float = 5
    max_seq_length: int = 128
    learning_rate: float = 1e-4
    batch_size: int = 32
    warmup: float = 0.06


_RECIPES = {
    "cola": Recipe(max_seq_length=64),
    "sst2": Recipe(epochs=3, max_seq_length=64),
    "qqp": Recipe(epochs=3),
    "mnli": Recipe(epochs=3),
    "qnli": Recipe(epochs=3),
}


def recipe(task: str, epochs: float | None = None) -> Recipe:
    """The settings of a task, with another number of epochs if one is given."""
    found = _RECIPES.get(task, Recipe())
    return found if epochs is None else replace(found, epochs=epochs)


def load_task(name: str, data_dir: str | None = None, tune: bool = False) -> TextTask:
    """
    The data of a task. Of a large one, 16,000 rows are trained on and 10,000 others kept for tuning.

    Args:
        name (`str`):
            A task of GLUE.
        data_dir (`str`, *optional*):
            Folder with the tasks in the official layout; by default they come from the hub.
        tune (`bool`, *optional*, defaults to `False`):
            Whether to judge on training rows that are held out, so that choices do not wear out the dev set: the
            10,000 of a large task, 15 % of a small one, which is then trained on the rest.

    Returns:
        [`TextTask`].
    """
    return judged(glue_task(name, data_dir), tune)


def judged(task: TextTask, tune: bool) -> TextTask:
    """The task as the study trains and judges it, see [`load_task`]."""
    large = len(task.train) >= TRAIN_ROWS + TUNING_ROWS
    if not (large or tune):
        return task
    rows = task.train.shuffle(seed=_SEED)
    cut = TRAIN_ROWS if large else len(rows) - round(HELD_OUT * len(rows))
    task = replace(task, train=rows.select(range(cut)))
    if not tune:
        return task
    held_out = rows.select(range(cut, min(len(rows), cut + TUNING_ROWS)))
    return replace(task, evaluations={"held_out": held_out})


def further(task: TextTask) -> Dataset | None:
    """
    Rows of a large task that no run trains on and no default is chosen by: the dev set of SST-2 has 872 rows, which is
    too few to tell methods apart.

    Args:
        task ([`TextTask`]):
            The task, whole.

    Returns:
        `datasets.Dataset` or `None`: At most 20,000 rows; `None` if there are none left.
    """
    start = TRAIN_ROWS + TUNING_ROWS
    if len(task.train) <= start:
        return None
    return task.train.shuffle(seed=_SEED).select(range(start, min(len(task.train), start + FURTHER_ROWS)))

"""`hf-admm glue`: sparse fine-tuning on a GLUE task."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

from hf_admm.commands.flags import DEFAULTS, CommandArguments, parse_flags, with_report
from hf_admm.commands.training import fine_tune
from hf_admm.console import say
from hf_admm.finetuning.glue import GLUE_TASKS, HUB_DATASET, get_task, load_glue
from hf_admm.finetuning.metric import GlueMetric
from hf_admm.finetuning.results import MODEL_FOLDER, results_table
from hf_admm.finetuning.tasks import TextTask


@dataclass
class GlueArguments(CommandArguments):
    """
    Flags of `hf-admm glue`.

    Args:
        task_name (`str`):
            One of the nine tasks.
        model_name_or_path (`str`):
            The pre-trained model.
        data_dir (`str`, *optional*):
            Folder that holds the tasks in the official layout. Without it they come from the hub.
        dense_baseline (`bool`, *optional*, defaults to `False`):
            Whether to train a dense model of equal steps as well.

    Raises:
        `ValueError`: If the task or the model is missing, or there is no such task.
    """

    task_name: str | None = field(default=None, metadata={"help": f"The task: {', '.join(GLUE_TASKS)}."})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "The pre-trained model: an id on the hub, or a folder."}
    )
    data_dir: str | None = field(
        default=None,
        metadata={"help": "Folder with the tasks in the official layout (CoLA/, SST-2/, ...). Default: from the hub."},
    )
    dense_baseline: bool = field(
        default=False, metadata={"help": "Whether to train a dense model too, with the same arguments and steps."}
    )

    def __post_init__(self):
        super().__post_init__()
        if missing := [name for name in ("task_name", "model_name_or_path") if getattr(self, name) is None]:
            raise ValueError(
                f"hf-admm glue needs {' and '.join('--' + name for name in missing)}, or in its --config."
            )
        self.task_name = self.task_name.lower()
        get_task(self.task_name)


def main(argv: Sequence[str]) -> int:
    """
    Runs `hf-admm glue`.

    Args:
        argv (`Sequence[str]`):
            The arguments after the command's name.

    Returns:
        `int`: 0.

    Raises:
        `ValueError`: If the input is not allowed.
    """
    description = "Fine-tunes a model on a GLUE task to a sparsity pattern. Writes results.json and model/."
    command, arguments = parse_flags(argv, "hf-admm glue", description, GlueArguments, with_report(DEFAULTS))
    arguments["output_dir"] = arguments["output_dir"] or os.path.join("runs", command.task_name)
    task = glue_task(command.task_name, command.data_dir)
    results = fine_tune(command, arguments, task, command.model_name_or_path, command.dense_baseline)
    if results is not None:
        say(results_table(results, arguments["output_dir"]))
        if not command.quiet and results["sparse"]:
            say(f"\nnext: hf-admm verify {os.path.join(arguments['output_dir'], MODEL_FOLDER)}")
    return 0


def glue_task(name: str, data_dir: str | None = None) -> TextTask:
    """
    A GLUE task in the form that a fine-tuning takes.

    Args:
        name (`str`):
            One of the nine tasks.
        data_dir (`str`, *optional*):
            Folder that holds the tasks in the official layout. Without it they come from the hub.

    Returns:
        [`TextTask`].

    Raises:
        `ValueError`: If the task is unknown, or its data or a package is missing.
    """
    spec, metric = get_task(name), GlueMetric(name)
    splits = load_glue(name, data_dir)
    return TextTask(
        name=name,
        train=splits["train"],
        evaluations={split.removeprefix("validation_"): splits[split] for split, _ in spec.evaluations},
        score=metric.compute,
        main_metric=spec.main_metric,
        labels=spec.labels,
        source=HUB_DATASET if data_dir is None else f"official layout, {spec.folder}",
    )

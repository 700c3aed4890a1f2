"""The nine GLUE tasks: what they look like and how to load them."""

import math
from dataclasses import dataclass
from pathlib import Path

import datasets

from hf_admm.console import get_logger


logger = get_logger(__name__)

HUB_DATASET = "nyu-mll/glue"

_SHOWN_LINES = 5


@dataclass(frozen=True)
class GlueTask:
    """
    What one task of the benchmark looks like.

    Args:
        folder (`str`):
            Name of the task's folder in the official layout.
        columns (`tuple[str, ...]`):
            The one or two text columns of the official files.
        hub_columns (`tuple[str, ...]`):
            The same columns on the hub.
        metrics (`tuple[str, ...]`):
            What the benchmark reports, the main one first.
        labels (`tuple[str, ...]`, *optional*, defaults to `()`):
            Names of the classes in the order of their ids, as on the hub. Empty for a regression.
        written_labels (`tuple[str, ...]`, *optional*):
            How the official files write the classes, if not by their names.
        label_column (`str`, *optional*, defaults to `"label"`):
            Label column of the official files.
        header (`tuple[str, ...]`, *optional*):
            Columns of files that come without a header.
        evaluations (`dict[str, str]`, *optional*):
            Evaluation splits and their files.
    """

    folder: str
    columns: tuple[str, ...]
    hub_columns: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    labels: tuple[str, ...] = ()
    written_labels: tuple[str, ...] | None = None
    label_column: str = "label"
    header: tuple[str, ...] | None = None
    evaluations: tuple[tuple[str, str], ...] = (("validation", "dev.tsv"),)

    @property
    def is_regression(self) -> bool:
        """Whether the task predicts a score instead of a class."""
        return not self.labels

    @property
    def main_metric(self) -> str:
        """The metric to compare two models by."""
        return self.metrics[0]

    @property
    def files(self) -> dict[str, str]:
        """File of each split in the official layout."""
        return {"train": "train.tsv", **dict(self.evaluations)}

    def parse_label(self, text: str) -> int | float | None:
        """The label that an official file writes as `text`, or `None` if the task has no such label."""
        if self.is_regression:
            try:
                score = float(text)
            except ValueError:
                return None
            return score if math.isfinite(score) else None
        written = self.written_labels or self.labels
        return written.index(text) if text in written else None


_PAIR = ("sentence1", "sentence2")
_BINARY = ("0", "1")
_ENTAILMENT = ("entailment", "not_entailment")

GLUE_TASKS = {
    "cola": GlueTask(
        folder="CoLA",
        columns=("sentence",),
        hub_columns=("sentence",),
        metrics=("matthews_correlation",),
        labels=("unacceptable", "acceptable"),
        written_labels=_BINARY,
        header=("source", "label", "mark", "sentence"),
    ),
    "sst2": GlueTask(
        folder="SST-2",
        columns=("sentence",),
        hub_columns=("sentence",),
        labels=("negative", "positive"),
        written_labels=_BINARY,
    ),
    "mrpc": GlueTask(
        folder="MRPC",
        columns=("#1 String", "#2 String"),
        hub_columns=_PAIR,
        metrics=("accuracy", "f1"),
        labels=("not_equivalent", "equivalent"),
        written_labels=_BINARY,
        label_column="Quality",
    ),
    "stsb": GlueTask(
        folder="STS-B", columns=_PAIR, hub_columns=_PAIR, metrics=("spearmanr", "pearson"), label_column="score"
    ),
    "qqp": GlueTask(
        folder="QQP",
        columns=("question1", "question2"),
        hub_columns=("question1", "question2"),
        metrics=("accuracy", "f1"),
        labels=("not_duplicate", "duplicate"),
        written_labels=_BINARY,
        label_column="is_duplicate",
    ),
    "mnli": GlueTask(
        folder="MNLI",
        columns=_PAIR,
        hub_columns=("premise", "hypothesis"),
        labels=("entailment", "neutral", "contradiction"),
        label_column="gold_label",
        evaluations=(("validation_matched", "dev_matched.tsv"), ("validation_mismatched", "dev_mismatched.tsv")),
    ),
    "qnli": GlueTask(
        folder="QNLI", columns=("question", "sentence"), hub_columns=("question", "sentence"), labels=_ENTAILMENT
    ),
    "rte": GlueTask(folder="RTE", columns=_PAIR, hub_columns=_PAIR, labels=_ENTAILMENT),
    "wnli": GlueTask(
        folder="WNLI",
        columns=_PAIR,
        hub_columns=_PAIR,
        labels=("not_entailment", "entailment"),
        written_labels=_BINARY,
    ),
}


def get_task(name: str) -> GlueTask:
    """
    Looks up a task.

    Args:
        name (`str`):
            One of the keys of `GLUE_TASKS`.

    Returns:
        [`GlueTask`].

    Raises:
        `ValueError`: If there is no such task.
    """
    if name not in GLUE_TASKS:
        raise ValueError(f"Unknown GLUE task {name!r}. Allowed: {', '.join(GLUE_TASKS)}.")
    return GLUE_TASKS[name]


def load_glue(task: str, data_dir: str | Path | None = None) -> datasets.DatasetDict:
    """
    Loads the labelled splits of a task, from the hub or from a folder in the official layout.

    Args:
        task (`str`):
            One of the keys of `GLUE_TASKS`.
        data_dir (`str` or `Path`, *optional*):
            Folder that holds the official task folders (`CoLA`, `SST-2`, ...). Without it the task comes from the hub.

    Returns:
        `datasets.DatasetDict`: The split `train` and those of [`GlueTask.evaluations`], each with the columns
        `sentence1`, `sentence2` (for pairs), `label` (a class id, a float for a regression) and `idx`.

    Raises:
        `ValueError`: If the task is unknown, the hub out of reach, or a folder, file or column missing.
    """
    spec = get_task(task)
    return _load_hub(task, spec) if data_dir is None else _load_folder(task, spec, Path(data_dir))


def _features(spec: GlueTask) -> datasets.Features:
    texts = {name: datasets.Value("string") for name in _PAIR[: len(spec.columns)]}
    label = datasets.Value("float32") if spec.is_regression else datasets.ClassLabel(names=list(spec.labels))
    return datasets.Features({**texts, "label": label, "idx": datasets.Value("int64")})


def _load_hub(task: str, spec: GlueTask) -> datasets.DatasetDict:
    try:
        loaded = datasets.load_dataset(HUB_DATASET, task)
    except ConnectionError as error:
        raise ValueError(
            f"Cannot load GLUE task {task!r} from the hub dataset {HUB_DATASET!r} ({error}). Go online, or give the "
            f"folder that holds {spec.folder}/ in the official layout with --data_dir (data_dir=... in Python)."
        ) from error
    names = dict(zip(spec.hub_columns, _PAIR, strict=False))
    splits = {}
    for split in spec.files:
        renamed = loaded[split].rename_columns({old: new for old, new in names.items() if old != new})
        splits[split] = renamed.select_columns(list(_features(spec))).cast(_features(spec))
    return datasets.DatasetDict(splits)


def _load_folder(task: str, spec: GlueTask, data_dir: Path) -> datasets.DatasetDict:
    folder = data_dir / spec.folder
    needed = ", ".join(spec.files.values())
    advice = f"GLUE task {task!r} in the official layout is a folder {spec.folder}/ that holds {needed}"
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder}. {advice}; give the folder that contains it.")
    if missing := [str(folder / name) for name in spec.files.values() if not (folder / name).is_file()]:
        raise ValueError(f"Missing {', '.join(missing)}. {advice}.")
    return datasets.DatasetDict({split: _read_file(spec, folder / name) for split, name in spec.files.items()})


def _read_file(spec: GlueTask, path: Path) -> datasets.Dataset:
    # Quotes are plain characters here and some texts hold a carriage return, so no csv dialect reads all the files.
    with open(path, encoding="utf-8-sig", newline="\n") as file:
        lines = [line.rstrip("\r\n").split("\t") for line in file]
    header, first = (list(spec.header), 1) if spec.header else (lines[0] if lines else [], 2)
    wanted = (*spec.columns, spec.label_column)
    if missing := [name for name in wanted if name not in header]:
        raise ValueError(
            f"{path} has no column {', '.join(map(repr, missing))}. Its columns are {', '.join(map(repr, header))}; "
            f"{spec.folder} needs {', '.join(map(repr, wanted))}, separated by tabs."
        )
    *text_indices, label_index = (header.index(name) for name in wanted)
    columns, skipped = {name: [] for name in _features(spec)}, []
    for number, fields in enumerate(lines[first - 1 :], start=first):
        if fields == [""]:
            continue
        label = spec.parse_label(fields[label_index].strip()) if len(fields) >= len(header) else None
        if label is None:
            skipped.append(number)
            continue
        for name, index in zip(_PAIR, text_indices, strict=False):
            columns[name].append(fields[index])
        columns["label"].append(label)
        columns["idx"].append(number - first)
    if not columns["label"]:
        raise ValueError(
            f"{path} holds no usable row: each needs {len(header)} columns separated by tabs and a label that is "
            f"{'a number' if spec.is_regression else 'one of ' + ', '.join(spec.written_labels or spec.labels)}."
        )
    if skipped:
        shown = ", ".join(map(str, skipped[:_SHOWN_LINES])) + (", ..." if len(skipped) > _SHOWN_LINES else "")
        logger.warning(
            f"{path}: skipped {len(skipped)} malformed rows of {len(lines) - first + 1} (lines {shown}). They lack "
            "columns or a label of the task; mend them, or copy the file anew."
        )
    return datasets.Dataset.from_dict(columns, features=_features(spec))

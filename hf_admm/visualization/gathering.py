"""Everything that a report says of a run, from its folder. What is not there is missing with a reason."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from torch import nn
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from hf_admm.audit import audit_checkpoint
from hf_admm.audit_report import AuditReport
from hf_admm.checkpoints.files import UNREADABLE, weight_files
from hf_admm.checkpoints.folders import Checkpoint, weight_folders
from hf_admm.visualization.activations import MapComparison, compare_maps
from hf_admm.visualization.logs import RunLogs, read_logs
from hf_admm.visualization.notes import RunNotes, read_notes
from hf_admm.visualization.places import DENSE_FOLDER, MODEL_FOLDER, RESULTS_NAME
from hf_admm.visualization.weights import DenseWeights, WeightFigures, weight_figures


# A larger model is not run for its activation maps: on a CPU it would take minutes, and twice its size.
LARGEST_MODEL = 4 * 1024**3


@dataclass
class RunFigures:
    """
    What a report says of a run.

    Args:
        name (`str`):
            What the run is called.
        pattern (`str`, *optional*):
            The pattern of its weights.
        results (`dict[str, Any]`, *optional*):
            The contents of `results.json`, which the commands write.
        logs ([`RunLogs`], *optional*), weights ([`WeightFigures`], *optional*), maps ([`MapComparison`], *optional*):
            What was found.
        missing (`dict[str, str]`, *optional*):
            What was not, and why.
        start (`str`, *optional*):
            The dense model that the run started from.
    """

    name: str
    pattern: str | None = None
    results: dict[str, Any] = field(default_factory=dict)
    logs: RunLogs | None = None
    weights: WeightFigures | None = None
    maps: MapComparison | None = None
    missing: dict[str, str] = field(default_factory=dict)
    start: str | None = None


def gather(run_dir: Path, model_dir: Path | None = None, start: str | None = None) -> RunFigures:
    """
    Gathers what there is of a run. Nothing is trained or downloaded; a few rows pass through the model, if the run
    noted some.

    Args:
        run_dir (`Path`):
            The folder of the run.
        model_dir (`Path`, *optional*):
            The folder of its model. By default `model/` within, the folder itself, or its last checkpoint.
        start (`str`, *optional*):
            The dense model that it started from, a folder or the id of a model in the hub's cache. By default what
            the run noted.

    Returns:
        [`RunFigures`]

    Raises:
        `ValueError`: If there is no such folder, it holds nothing to report, or a file is damaged.
    """
    if not run_dir.is_dir():
        raise ValueError(f"{run_dir} is not a folder. Give the output_dir of a run, or the folder of a checkpoint.")
    notes, found = read_notes(run_dir), RunFigures(run_dir.resolve().name, results=_read_results(run_dir))
    found.start = start or notes.start
    add_logs(found, read_logs(run_dir), notes.switch)
    folder = model_dir or _model_folder(run_dir)
    if folder is None and found.logs is None and not found.results:
        raise ValueError(
            f"{run_dir} holds no model.safetensors, trainer_state.json or {RESULTS_NAME}, in itself, in "
            f"{MODEL_FOLDER}/ or in a checkpoint. Give the output_dir of a run, or the folder of a checkpoint."
        )
    if folder is None:
        found.missing["weights"] = "no saved model was found in the folder of the run"
        return found
    dense = dense_weights(found)
    report = _in_order(audit_checkpoint(folder), folder)
    stored = sum(file.stat().st_size for part in weight_folders(folder) for file in weight_files(part))
    add_weights(found, weight_figures(lambda: _tensors(folder), report, stored, dense))
    trained = run_dir / DENSE_FOLDER / MODEL_FOLDER
    # One that the results do not speak of is left from an earlier run.
    beside = trained.is_dir() and (not found.results or bool(found.results.get("dense")))
    with with_reason(found, "activations"):
        other, against = (str(trained), "fine-tuned") if beside else (found.start, "before training")
        add_maps(
            found, notes, lambda: load_model(folder), lambda model: load_model(local_folder(other), model), against
        )
    return found


def add_logs(found: RunFigures, entries: list[dict] | None, switch: int | None) -> None:
    """Adds what was logged, or says what is not there."""
    if entries is None:
        found.missing["logs"] = "no trainer_state.json was found: call trainer.save_state() after training"
        return
    found.logs = logs = RunLogs(entries, switch)
    if not logs.series("admm/primal_residual")[0]:
        found.missing["residuals"] = "the run logged no residual, as a run without ADMM or of a few steps does"
    if not logs.series("admm/mask_flips")[0]:
        found.missing["mask flips"] = "the run logged none"
    for name, key in (("loss", "loss"), ("learning rate", "learning_rate")):
        if not logs.series(key)[0]:
            found.missing[name] = "the run logged none: its logging_steps may be longer than it"
    if not logs.metrics:
        found.missing["metric over time"] = "nothing was evaluated during training: set eval_strategy"


def add_weights(found: RunFigures, weights: WeightFigures) -> None:
    """Adds what was found of the weights, or says what is not there."""
    found.weights = weights
    if not weights.report.sparse:
        found.missing["sparsity by layer"] = "no weight of the model is sparse"
        return
    found.pattern = weights.report.pattern
    if not weights.masks:
        found.missing["masks"] = f"pattern {found.pattern} has no groups that are small enough to be counted"
    if not weights.lost:
        reason = found.missing.pop("dense weights", None) or (
            f"the weights of {found.start} have other names or shapes than those of the model"
            if found.start
            else "the run did not note the model that it started from: name it with --start"
        )
        found.missing["magnitude lost"] = reason
    found.missing.pop("dense weights", None)


def add_maps(
    found: RunFigures,
    notes: RunNotes,
    load_sparse: Callable[[], nn.Module],
    load_dense: Callable[[nn.Module], nn.Module],
    against: str,
) -> None:
    """
    Runs the rows of a run through its model and a dense one, and adds what comes of it.

    Raises:
        `ValueError`: If something that this needs is not there; the message is the reason.
    """
    sparse = found.weights.report.sparse
    if not sparse:
        raise ValueError("no weight of the model is sparse")
    if not notes.rows:
        raise ValueError("the run noted no rows of data: set sparsity_report")
    if found.weights.stored > LARGEST_MODEL:
        raise ValueError(f"the model is larger than {LARGEST_MODEL // 1024**3} GiB, too large to be run for a report")
    if against == "before training" and not found.start:
        raise ValueError("the run did not note the dense model that it started from: name it with --start")
    model = load_sparse()
    layers = [audit.name for audit in sparse if _is_layer(model, audit.name)]
    if not layers:
        raise ValueError(f"none of the sparse weights is the weight of a layer of {type(model).__name__} by its name")
    rows = [{name: value.to(next(model.parameters()).device) for name, value in row.items()} for row in notes.rows]
    dense = load_dense(model).to(next(model.parameters()).device)
    found.maps = compare_maps(dense, model, layers, rows, against)


def _is_layer(model: nn.Module, name: str) -> bool:
    module, _, attribute = name.rpartition(".")
    try:
        return attribute == "weight" and hasattr(model.get_submodule(module), "weight")
    except AttributeError:
        return False


def load_model(folder: Path, like: nn.Module | None = None) -> nn.Module:
    """
    Loads a model of transformers from its folder.

    Args:
        folder (`Path`):
            The folder.
        like (`nn.Module`, *optional*):
            A model of the class and the configuration that it should have.

    Raises:
        `ValueError`: If it is not a model of transformers.
    """
    with _quiet():
        if like is not None:
            return type(like).from_pretrained(
                folder, config=like.config, dtype=torch.float32, ignore_mismatched_sizes=True, local_files_only=True
            )
        names = transformers.AutoConfig.from_pretrained(folder).architectures or [None]
        cls = getattr(transformers, str(names[0]), None)
        if cls is None:
            raise ValueError(f"{names[0]} is not a class of transformers, by which the model could be loaded")
        return cls.from_pretrained(folder, dtype=torch.float32, local_files_only=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without progress bars, and warnings of heads that are new: only hidden states are looked at."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def with_reason(found: RunFigures, what: str) -> Iterator[None]:
    """Whatever the code of a model raises is the reason why a part is left out: the rest is worth a page."""
    try:
        yield
    except Exception as error:
        found.missing[what] = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def dense_weights(found: RunFigures) -> DenseWeights | None:
    """The weights of the dense model that a run started from, `None` if they are not to be had."""
    if not found.start:
        return None
    with with_reason(found, "dense weights"):
        return DenseWeights(local_folder(found.start))


def local_folder(path_or_id: str) -> Path:
    """A folder, or that of a model in the hub's cache; nothing is downloaded."""
    if Path(path_or_id).is_dir():
        return Path(path_or_id)
    try:
        return Path(snapshot_download(path_or_id, local_files_only=True, allow_patterns=["*.safetensors", "*.json"]))
    except Exception as error:  # of the hub's client, of many kinds
        raise ValueError(
            f"{path_or_id} is neither a folder nor a model in the hub's cache: give its folder with --start"
        ) from error


def _model_folder(run_dir: Path) -> Path | None:
    checkpoint = get_last_checkpoint(str(run_dir))
    for folder in (run_dir / MODEL_FOLDER, run_dir, *([Path(checkpoint)] if checkpoint else [])):
        if folder.is_dir():
            try:
                if all(weight_files(part) for part in weight_folders(folder)):
                    return folder
            except ValueError:
                continue
    return None


def _tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    return ((stored.name, stored.tensor) for stored in Checkpoint.find(folder).tensors())


def _read_results(run_dir: Path) -> dict[str, Any]:
    file = run_dir / RESULTS_NAME
    if not file.is_file():
        return {}
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
        return results if isinstance(results.get("sparse") or results.get("dense"), dict) else {}  # not ours
    except UNREADABLE as error:
        raise ValueError(f"{file} is damaged ({type(error).__name__}: {error}). Remove it, or restore it.") from error


def _in_order(report: AuditReport, folder: Path) -> AuditReport:
    """The weights in the order of the model, which the record keeps; files are sorted by name."""
    names = (name for record in Checkpoint.find(folder).records.values() for name in record.targets)
    order = {name: place for place, name in enumerate(names)}
    return replace(
        report, weights=sorted(report.weights, key=lambda audit: order.get(audit.name.rpartition("/")[2], len(order)))
    )


def finite(value: Any) -> float | None:
    """A number, `None` for what is none or is not finite."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None

"""Writes the report of a run: the page and, beside it, its figures as files."""

import os
from contextlib import suppress
from pathlib import Path

from torch import nn
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from hf_admm.audit import audit_weights
from hf_admm.pruning.shards import DTensor
from hf_admm.pruning.state import ADMMState
from hf_admm.sparsity.targets import named_parameters
from hf_admm.training.traceless import same_randomness
from hf_admm.visualization.drawing import DARK, LIGHT, check_installed, render
from hf_admm.visualization.gathering import (
    RunFigures,
    add_logs,
    add_maps,
    add_weights,
    dense_weights,
    gather,
    load_model,
    local_folder,
    with_reason,
)
from hf_admm.visualization.notes import RunNotes, save_notes, take_rows
from hf_admm.visualization.page import page
from hf_admm.visualization.places import PAGE_NAME, REPORT_FOLDER
from hf_admm.visualization.sections import sections
from hf_admm.visualization.weights import weight_figures


def write_report(
    run_dir: str | os.PathLike,
    model_dir: str | os.PathLike | None = None,
    start: str | None = None,
    output_dir: str | os.PathLike | None = None,
) -> Path:
    """
    Writes the report of a run from what lies in its folder. Nothing is trained.

    Args:
        run_dir (`str` or `os.PathLike`):
            The folder of the run, or of a checkpoint.
        model_dir (`str` or `os.PathLike`, *optional*):
            The folder of its model. By default `model/` within, the folder itself, or its last checkpoint.
        start (`str`, *optional*):
            The dense model that it started from, a folder or the id of a model in the hub's cache. By default what
            the run noted.
        output_dir (`str` or `os.PathLike`, *optional*):
            Where to write it. By default `report/` in the folder of the run.

    Returns:
        `Path`: The page.

    Raises:
        `ValueError`: If matplotlib is not installed, or there is nothing to report.
    """
    check_installed()
    found = gather(Path(run_dir), None if model_dir is None else Path(model_dir), start)
    return write_page(found, Path(output_dir or Path(run_dir) / REPORT_FOLDER))


def write_page(found: RunFigures, folder: Path) -> Path:
    """
    Draws the figures and writes them and the page. Each file appears whole or not at all, the page last; figures of an
    earlier report that this one has not go.

    Args:
        found ([`RunFigures`]):
            What there is of the run.
        folder (`Path`):
            Where to write it.

    Returns:
        `Path`: The page.
    """
    parts = sections(found)
    drawn = [picture for pictures in parts.values() for picture in pictures]
    images = {picture.name: (render(picture.draw, LIGHT), render(picture.draw, DARK)) for picture in drawn}
    html = page(found, parts, images)
    folder.mkdir(parents=True, exist_ok=True)
    for name, (light, _) in images.items():
        _write(folder / f"{name}.png", light)
    _write(folder / PAGE_NAME, html.encode("utf-8", "replace"))
    for name in set(FIGURES) - images.keys():
        (folder / f"{name}.png").unlink(missing_ok=True)
    return folder / PAGE_NAME


# Every figure that a report may have.
FIGURES = (
    *("metrics", "residuals", "mask_flips", "learning_rate", "loss"),
    *("sparsity_by_layer", "magnitude_lost", "masks", "matrix", "activation_map", "regional_sparsity"),
)


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def note_run(run_dir: Path, model: nn.Module, start: str | None, switch: int | None, loader) -> RunNotes:
    """
    Writes what a report will need and nothing else keeps: a few rows of data among it.

    Args:
        run_dir (`Path`):
            The folder of the run.
        model (`nn.Module`):
            The model, as it is.
        start (`str`, *optional*):
            The dense model that the run started from.
        switch (`int`, *optional*):
            The number of steps of phase 1.
        loader (`torch.utils.data.DataLoader`, *optional*):
            Whose dataset the rows come from.

    Returns:
        [`RunNotes`]
    """
    rows = []
    dataset, collate = getattr(loader, "dataset", None), getattr(loader, "collate_fn", None)
    if collate is not None and hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"):
        # A dataset or a collator may fail, or make no batch of one row: then the report has no activation maps.
        with suppress(Exception), same_randomness(model, next(model.parameters()).device):
            labels = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
            rows = take_rows(dataset, collate, keep_labels=labels)
    notes = RunNotes(start, switch, rows)
    save_notes(notes, run_dir)
    return notes


def report_training(
    run_dir: Path, model: nn.Module, state: TrainerState, sparsity: ADMMState | None, switch: int | None, loader
) -> Path:
    """
    Writes the report of a run that has just ended, from the model in memory.

    Args:
        run_dir (`Path`):
            The folder of the run, which receives `trainer_state.json` too.
        model (`nn.Module`):
            The model.
        state ([`~transformers.TrainerState`]):
            What Trainer logged.
        sparsity ([`ADMMState`], *optional*):
            The sparse weights. Without them, as in a plain `Trainer`, the weights are those of the last checkpoint.
        switch (`int`, *optional*):
            The number of steps of phase 1.
        loader (`torch.utils.data.DataLoader`, *optional*):
            Whose dataset rows are taken from.

    Returns:
        `Path`: The page.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    temporary = run_dir / f".{TRAINER_STATE_NAME}.{os.getpid()}"
    state.save_to_json(str(temporary))
    os.replace(temporary, run_dir / TRAINER_STATE_NAME)
    start = getattr(model, "name_or_path", None) or None
    notes = note_run(run_dir, model, start, switch, loader)
    if sparsity is None or not sparsity.targets:
        return write_report(run_dir)
    found = RunFigures(run_dir.resolve().name, start=start)
    add_logs(found, state.log_history, switch)
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        found.missing["weights"] = "they are sharded: save the model, then run hf-admm report on the folder of the run"
        return write_page(found, run_dir / REPORT_FOLDER)
    weights = sparsity.weights
    report = audit_weights(weights.whole(), weights.pattern, weights.released)
    stored = sum(tensor.numel() * tensor.element_size() for tensor in named_parameters(model).values())
    tensors = lambda: ((name, tensor) for name, tensor, _ in weights.whole())  # noqa: E731
    add_weights(found, weight_figures(tensors, report, stored, dense_weights(found)))
    with with_reason(found, "activations"), same_randomness(model, next(model.parameters()).device):
        add_maps(found, notes, lambda: model, lambda like: load_model(local_folder(start), like), "before training")
    return write_page(found, run_dir / REPORT_FOLDER)

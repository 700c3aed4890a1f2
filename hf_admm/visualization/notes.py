"""What a run notes for its report, beside what Trainer writes: where it started, its switch, a few rows of data."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


# Uploads to the hub ignore `_*`: the rows are somebody's data.
NOTES_NAME = "_report.safetensors"
ROWS = 8
_LABELS = ("label", "labels", "label_ids")


@dataclass(frozen=True)
class RunNotes:
    """
    What a run notes for its report.

    Args:
        start (`str`, *optional*):
            The folder or hub id of the dense model that it started from.
        switch (`int`, *optional*):
            The number of steps of phase 1.
        rows (`list[dict[str, torch.Tensor]]`, *optional*):
            Inputs of the model, a batch of one row each, without padding.
    """

    start: str | None = None
    switch: int | None = None
    rows: list[dict[str, torch.Tensor]] = field(default_factory=list)


def save_notes(notes: RunNotes, run_dir: Path) -> None:
    """Writes the notes of a run into its folder, in one step."""
    # `format` so that there is a header to read, if there is nothing else.
    texts = {"format": "pt", "start": notes.start, "switch": None if notes.switch is None else str(notes.switch)}
    tensors = {
        f"{place:02d}/{name}": tensor.detach().cpu().contiguous().clone()
        for place, row in enumerate(notes.rows)
        for name, tensor in row.items()
    }
    run_dir.mkdir(parents=True, exist_ok=True)
    temporary = run_dir / f"{NOTES_NAME}.{os.getpid()}"
    save_file(tensors, temporary, metadata={name: text for name, text in texts.items() if text is not None})
    os.replace(temporary, run_dir / NOTES_NAME)


def read_notes(run_dir: Path) -> RunNotes:
    """
    Reads the notes of a run; empty ones if it left none.

    Raises:
        `ValueError`: If the file is damaged.
    """
    path = run_dir / NOTES_NAME
    if not path.is_file():
        return RunNotes()
    try:
        with safe_open(path, framework="pt") as file:
            texts, rows = file.metadata() or {}, {}
            for key in sorted(file.keys()):
                place, _, name = key.partition("/")
                rows.setdefault(place, {})[name] = file.get_tensor(key)
            switch = int(texts["switch"]) if "switch" in texts else None
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}). Remove it to make the report without it.") from error
    return RunNotes(texts.get("start"), switch, list(rows.values()))


def take_rows(dataset: Sequence, collate: Callable, keep_labels: bool = False, count: int = ROWS) -> list[dict]:
    """
    The first rows of a dataset as a model takes them. Padding is cut off, which would be part of every map.

    Args:
        dataset (`Sequence`):
            The rows, as a dataloader takes them.
        collate (`Callable`):
            Makes a batch of a list of rows.
        keep_labels (`bool`, *optional*, defaults to `False`):
            Whether the model needs labels to compute its hidden states, as an encoder-decoder may.
        count (`int`, *optional*, defaults to 8):
            How many rows to take.

    Returns:
        `list[dict[str, torch.Tensor]]`: A batch for each row.
    """
    rows = []
    for place in range(min(count, len(dataset))):
        batch = {name: value for name, value in collate([dataset[place]]).items() if isinstance(value, torch.Tensor)}
        if not keep_labels:
            batch = {name: value for name, value in batch.items() if name not in _LABELS}
        mask = batch.get("attention_mask")
        if mask is not None and mask.dim() == 2 and bool(mask[0].any()):
            kept = mask[0].bool()
            batch = {
                name: value[:, kept] if value.shape[:2] == mask.shape and name not in _LABELS else value
                for name, value in batch.items()
            }
        rows.append(batch)
    return rows

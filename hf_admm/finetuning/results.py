"""The record of a fine-tuning: `results.json` and the table that a person reads."""

import json
import math
import os
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hf_admm.reporting.tables import format_table
from hf_admm.version import __version__
from hf_admm.visualization.places import DENSE_FOLDER, MODEL_FOLDER, RESULTS_NAME


__all__ = [
    "DENSE_FOLDER",
    "MODEL_FOLDER",
    "RESULTS_NAME",
    "Run",
    "format_table",
    "results_table",
    "summarize_runs",
    "write_json",
]

_PACKAGES = ("torch", "transformers", "accelerate", "datasets", "evaluate")


@dataclass(frozen=True)
class Run:
    """
    What one training left behind.

    Args:
        metrics (`dict[str, float]`):
            Metrics of the saved model.
        seconds (`float`):
            Time of the training, the saving and the evaluation.
        steps (`int`):
            Optimizer steps.
        sparsity (`float`):
            Share of zeros in the pruned weights.
        violations (`int`):
            Groups that break the pattern.
    """

    metrics: dict[str, float]
    seconds: float
    steps: int
    sparsity: float
    violations: int


def summarize_runs(runs: dict[str, Run]) -> dict[str, Any]:
    """
    The part of `results.json` that comes from the runs.

    Args:
        runs (`dict[str, Run]`):
            The runs by kind, `"sparse"` or `"dense"`, the main one first.

    Returns:
        `dict[str, Any]`: Sparsity, broken groups and steps of the main run, metrics and seconds of each, versions.
    """
    main = next(iter(runs.values()))
    seconds = {kind: round(run.seconds, 1) for kind, run in runs.items()}
    return {
        "sparsity": main.sparsity,
        "violations": main.violations,
        "sparse": runs["sparse"].metrics if "sparse" in runs else None,
        "dense": runs["dense"].metrics if "dense" in runs else None,
        "seconds": {**seconds, "total": round(sum(run.seconds for run in runs.values()), 1)},
        "steps": main.steps,
        "versions": {
            "python": platform.python_version(),
            "hf_admm": __version__,
            **{name: version(name) for name in _PACKAGES},
        },
    }


def write_json(content: dict[str, Any], path: str | os.PathLike) -> None:
    """
    Writes a JSON file in one step: a reader sees the old file or the new one, never a part.

    Args:
        content (`dict[str, Any]`):
            What to write. A number that is not finite, such as the correlation of a constant, becomes `null`.
        path (`str` or `os.PathLike`):
            Where to write it; missing folders are made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(_jsonable(content), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)


def results_table(results: dict[str, Any], output_dir: str | os.PathLike) -> str:
    """
    What `results.json` says, for a person.

    Args:
        results (`dict[str, Any]`):
            The contents of `results.json`.
        output_dir (`str` or `os.PathLike`):
            The folder that holds it.

    Returns:
        `str`: A table with a row for each run: its metrics, sparsity, broken groups, time and model.
    """
    main = "sparse" if results["sparse"] else "dense"
    metrics = [name for name in results[main] if not name.endswith("loss")]
    rows = []
    for kind in ("dense", "sparse"):
        if not results[kind]:
            continue
        scores = [_number(results[kind][name]) for name in metrics]
        sparsity, broken = (f"{results['sparsity']:.2%}", str(results["violations"])) if kind == "sparse" else ("", "")
        folder = Path(output_dir) if kind == main else Path(output_dir) / DENSE_FOLDER
        name = f"sparse {results['pattern']}" if kind == "sparse" else kind
        time = f"{results['seconds'][kind]:.0f} s"
        rows.append([name, *scores, sparsity, broken, time, str(folder / MODEL_FOLDER)])
    return format_table(["", *metrics, "zeros", "broken groups", "time", "model"], rows)


def _number(value: float | None) -> str:
    return "undefined" if value is None or not math.isfinite(value) else f"{value:.4f}"

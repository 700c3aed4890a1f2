"""Timing side by side in one run, and the files that the results go to."""

import argparse
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import transformers


RESULTS = Path(__file__).parent / "results"
MIB = 2**20


def now() -> float:
    """Seconds on the wall clock, once the device has done what it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def interleave(
    contenders: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 1, seed: int = 0
) -> dict[str, list[float]]:
    """
    Times functions side by side: each round calls every one once, in a new order, so that what else the machine does
    hits all alike, and the times of one round can be divided by each other.

    Args:
        contenders (`Mapping[str, Callable]`):
            The functions, by name.
        rounds (`int`):
            How many rounds are timed.
        warmup (`int`, *optional*, defaults to 1):
            How many rounds go before, untimed.
        seed (`int`, *optional*, defaults to 0):
            Of the orders.

    Returns:
        `dict[str, list[float]]`: Seconds of each round, by name.
    """
    order, shuffle = list(contenders), random.Random(seed).shuffle
    seconds = {name: [] for name in contenders}
    for index in range(warmup + rounds):
        shuffle(order)
        for name in order:
            start = now()
            contenders[name]()
            elapsed = now() - start
            if index >= warmup:
                seconds[name].append(elapsed)
    return seconds


def ratios(of: Sequence[float], to: Sequence[float]) -> list[float]:
    """The ratio of each round."""
    return [a / b for a, b in zip(of, to, strict=True)]


def summary(values: Sequence[float], resamples: int = 2000) -> dict:
    """
    Describes the ratios of all rounds.

    Args:
        values (`Sequence[float]`):
            One figure a round.
        resamples (`int`, *optional*, defaults to 2000):
            Of the bootstrap.

    Returns:
        `dict`: `median` and the bounds `low` and `high` of its 95 % bootstrap interval, `min`, `max`, and `rounds`,
        the figures themselves.
    """
    drawn = np.random.default_rng(0).choice(np.asarray(values, dtype=float), (resamples, len(values)))
    low, high = np.percentile(np.median(drawn, axis=1), (2.5, 97.5))
    figures = {"median": statistics.median(values), "low": low, "high": high, "min": min(values), "max": max(values)}
    return {name: _short(figure) for name, figure in figures.items()} | {"rounds": [_short(v) for v in values]}


def _short(figure: float) -> float:
    return float(f"{figure:.5g}")


def row(figure: str, values: Sequence[float] | None = None, **fields) -> dict:
    """
    A line of the tables that `benchmarks.table` writes.

    Args:
        figure (`str`):
            What is measured, in a few words.
        values (`Sequence[float]`, *optional*):
            The ratio of each round, or a single figure.
        fields:
            `at_most` or `at_least` (the target), `unit` (by default a ratio), `beside` (figures of others from the
            same run, by name), and whatever else is to be kept.

    Returns:
        `dict`.
    """
    return {"figure": figure, **({} if values is None else {"result": summary(values)}), **fields}


def machine(threads: int) -> dict:
    """What the figures were taken on."""
    facts = {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": threads,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "load_before": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def parser(description: str, **defaults) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks have."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--output_dir", type=Path, default=RESULTS, help="folder of the results")
    options.add_argument("--threads", type=int, default=2, help="threads of torch")
    options.set_defaults(**defaults)
    return options


def write_result(name: str, folder: Path, threads: int, rows: Sequence[dict], skipped: Mapping[str, str], **about):
    """
    Writes `NAME.json`.

    Args:
        name (`str`):
            Of the benchmark.
        folder (`Path`):
            Where to.
        threads (`int`):
            Threads of torch.
        rows (`Sequence[dict]`):
            What [`row`] made.
        skipped (`Mapping[str, str]`):
            The contenders that were left out, and why.
        about:
            What else defines the run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    arguments = " ".join(sys.argv[1:])
    result = {
        "benchmark": name,
        "command": f"python -m benchmarks.{name} {arguments}".strip(),
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(threads),
        **about,
        "skipped": dict(skipped),
        "rows": list(rows),
    }
    path = folder / f"{name}.json"
    text = json.dumps(result, indent=1)
    # One figure a line is no good in a diff of hundreds of rounds.
    path.write_text(_join_numbers(text) + "\n", encoding="utf-8")
    print(f"wrote {os.path.relpath(path)}")


def _join_numbers(text: str) -> str:
    lines, joined = text.split("\n"), []
    within = False
    for line in lines:
        if within:
            joined[-1] += line.strip() + (" " if line.endswith(",") else "")
            within = not line.strip().startswith("]")
        else:
            joined.append(line)
            within = line.endswith('"rounds": [')
    return "\n".join(joined)


def show(rows: Sequence[dict]) -> None:
    """Prints the medians as they come."""
    for entry in rows:
        result = entry.get("result")
        text = f"{result['median']:.4g} ({result['low']:.4g} to {result['high']:.4g})" if result else "not measured"
        beside = ", ".join(f"{name} {figure:.4g}" for name, figure in entry.get("beside", {}).items())
        parts = [part for part in (text, entry.get("note"), beside) if part]
        print(f"  {entry['figure']}: {' | '.join(parts)}", flush=True)

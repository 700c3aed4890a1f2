"""Sums up the lines of a study: means over seeds, and pairs of two methods with the same task and seed."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean

from scipy import stats


LEVEL = 0.95
_ROUNDING = 1e-9
DENSE = ("dense", "dense_averaged", "dense_linear")


@dataclass(frozen=True)
class Estimate:
    """
    A mean with what is known of its error.

    Args:
        mean (`float`):
            The mean.
        error (`float`, *optional*):
            Its standard error; `None` for a single value.
        low, high (`float`, *optional*):
            Bounds of the 95 % interval by Student's t; `None` for a single value, and for two that are equal:
            where few rows judge, chance makes such.
        count (`int`):
            How many values.
    """

    mean: float
    error: float | None
    low: float | None
    high: float | None
    count: int

    def verdict(self, unit: float = 0.0) -> str:
        """Whether the interval lies above a value, below it or around it; nothing can be said of a single value."""
        if self.low is None:
            return "no interval"
        return "above" if self.low > unit else "below" if self.high < unit else "not told apart"


def estimate(values: Sequence[float]) -> Estimate | None:
    """The mean of values with its standard error and interval, `None` if there are none."""
    values = list(values)
    if not values:
        return None
    if len(values) == 1:
        return Estimate(values[0], None, None, None, 1)
    error = float(stats.sem(values))
    equal = error < _ROUNDING
    if equal and len(values) == 2:
        return Estimate(mean(values), error, None, None, 2)
    low, high = (mean(values),) * 2 if equal else stats.t.interval(LEVEL, len(values) - 1, mean(values), error)
    return Estimate(mean(values), error, float(low), float(high), len(values))


class Study:
    """
    The lines that can be compared: judged on dev sets, of whole runs.

    Of each method, pattern, task and learning rate, the latest settings count; of the rates, the best by the mean over
    seeds among those with most seeds. The precision is what the machine has, and no setting: a run in bf16 and one in
    float32 are two of a method, and are never paired with each other.

    Args:
        lines (`Iterable[dict]`):
            Those of the results, in their order.
    """

    def __init__(self, lines: Iterable[dict]):
        lines = list(lines)
        whole = [line for line in lines if line["judged_on"] == "dev" and not line["rows"]]
        whole = [line for line in whole if line["arguments"]["max_steps"] <= 0]
        self.unused = {"quick or tuning runs": len(lines) - len(whole)}
        groups: dict[tuple, dict[str, dict]] = defaultdict(dict)
        for line in whole:
            groups[_cell(line) + (line["rate"],)][_settings(line)] = line  # the last of a group is its latest
        latest = {cell: list(found)[-1] for cell, found in groups.items()}
        current = [line for line in whole if latest[_cell(line) + (line["rate"],)] == _settings(line)]
        self.unused["runs with earlier settings"] = len(whole) - len(current)
        defined = [line for line in current if line["value"] is not None]
        self.undefined = [line for line in current if line["value"] is None]
        rates: dict[tuple, dict[float, list[dict]]] = defaultdict(lambda: defaultdict(list))
        for line in defined:
            rates[_cell(line)][line["rate"]].append(line)
        self.lines = [line for tried in rates.values() for line in max(tried.values(), key=_merit)]
        self.rates = {cell: sorted(tried) for cell, tried in rates.items()}
        self.tasks = sorted({line["task"] for line in self.lines})
        self.seeds = sorted({line["seed"] for line in self.lines})
        self.patterns = [p for p in _in_order(line["pattern"] for line in self.lines) if p != "none"]

    def cell(self, method: str, pattern: str, task: str | None = None) -> dict[tuple[str, int, bool], dict]:
        """The lines of a method, by task, seed and whether it is bf16. A dense method has no pattern."""
        pattern = "none" if method in DENSE else pattern
        wanted = [line for line in self.lines if (line["method"], line["pattern"]) == (method, pattern)]
        wanted = [line for line in wanted if task in (None, line["task"])]
        return {(line["task"], line["seed"], line["arguments"]["bf16"]): line for line in wanted}

    def values(
        self, method: str, pattern: str, task: str | None = None, further: bool = False
    ) -> dict[tuple[str, int, bool], float]:
        """
        The main metrics of a method, by what [`Study.cell`] has them by: on the dev set, or on the further rows where
        a run was judged on some.
        """
        found = self.cell(method, pattern, task)
        if not further:
            return {place: line["value"] for place, line in found.items()}
        return {place: line["further"][line["metric"]] for place, line in found.items() if line.get("further")}

    def methods(self, pattern: str) -> list[str]:
        """The sparse methods that were run at a pattern."""
        return _in_order(line["method"] for line in self.lines if line["pattern"] == pattern)

    @property
    def reference(self) -> str | None:
        """The dense method that the others are measured by: the better one, on what all of them were run on."""
        found = {name: self.values(name, "none") for name in DENSE}
        found = {name: values for name, values in found.items() if values}
        common = set.intersection(*map(set, found.values())) if found else set()
        if not common:
            return max(found, key=lambda name: len(found[name]), default=None)
        return max(found, key=lambda name: mean(found[name][place] for place in common))

    def difference(
        self, method: str, other: str, pattern: str, task: str | None = None, further: bool = False
    ) -> Estimate | None:
        """One method less another, in points, over the pairs that [`Study.values`] has of both."""
        first, second = (self.values(name, pattern, task, further) for name in (method, other))
        return estimate([100 * (first[place] - second[place]) for place in sorted(first.keys() & second.keys())])

    def share(self, method: str, pattern: str, task: str | None = None) -> Estimate | None:
        """
        The metric as a share of the dense model's: the mean over tasks of the mean over seeds, its error from all
        pairs.
        """
        if self.reference is None:
            return None
        ours, dense = self.values(method, pattern, task), self.values(self.reference, "none", task)
        shares = {p: ours[p] / dense[p] for p in sorted(ours.keys() & dense.keys()) if dense[p] > 0}
        found = estimate(list(shares.values()))
        if found is None:
            return None
        by_task = defaultdict(list)
        for (name, *_), share in shares.items():
            by_task[name].append(share)
        middle = mean(mean(of_task) for of_task in by_task.values())
        moved = middle - found.mean  # 0 where every task has the same seeds
        low, high = (None, None) if found.low is None else (found.low + moved, found.high + moved)
        return Estimate(middle, found.error, low, high, found.count)

    def missing(self, methods: Sequence[str]) -> list[str]:
        """What was not run of the grid that the lines span, for the docs."""
        gaps = []
        for pattern in self.patterns:
            untouched = []
            for method in methods:
                seeds = {}
                for task in self.tasks:
                    done = {seed for _, seed, _ in self.values(method, pattern, task)}
                    seeds[task] = [seed for seed in self.seeds if seed not in done]
                if all(absent == self.seeds for absent in seeds.values()):
                    untouched.append(method)
                elif parts := [
                    f"{task} seeds {', '.join(map(str, absent))}" for task, absent in seeds.items() if absent
                ]:
                    gaps.append(f"{method if method in DENSE else f'{method} at {pattern}'}: {'; '.join(parts)}")
            if untouched:
                gaps.append(f"at {pattern} on any task: {', '.join(untouched)}")
        return list(dict.fromkeys(gaps))


def _cell(line: dict) -> tuple:
    return line["method"], line["pattern"], line["task"]


def _settings(line: dict) -> str:
    kept = ("arguments", "model", "max_seq_length", "label")
    return repr([_of_choice(line[name]) if name == "arguments" else line[name] for name in kept])


def _of_choice(arguments: dict) -> list[tuple]:
    return sorted((name, value) for name, value in arguments.items() if name != "bf16")


def _merit(lines: list[dict]) -> tuple:
    return len({line["seed"] for line in lines}), mean(line["value"] for line in lines)


def _in_order(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))

"""
Writes the tables of README.md and docs/benchmarks.md from the results that there are.

Only what lies between the markers is replaced. README.md gets a few rows, docs/benchmarks.md all of them.
"""

import argparse
import json
from pathlib import Path

from benchmarks.common import RESULTS


START, END = "<!-- bench:start -->", "<!-- bench:end -->"
ROOT = Path(__file__).parent.parent
# The README's rows: what a user pays for.
SHORT = (
    "step of phase 1, batch 32x32",
    "step of phase 2, batch 32x32",
    "step of phase 1, batch 32x128",
    "step of phase 2, batch 32x128",
    "projection 2:4, fp32, 1 thread",
    "projection 1:4, fp32, 1 thread",
    "state of phase 2",
    "peak of phase 2 without the state",
)
ORDER = ("step_overhead", "projection", "memory", "scale", "serving", "serving_cpu")
PREAMBLE = """# Benchmarks

`make bench` takes every figure anew and writes this page and the README's table. Each is a ratio of times or bytes
measured side by side in one run: contenders alternate in a new order each round, the ratio is taken within a round,
and the table has the median. All rounds are in `benchmarks/results/`.

"""


def load(folder: Path) -> list[dict]:
    """The results in a folder, in the order of the tables."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")]
    found = [result for result in found if "benchmark" in result]  # the curves of the guide are none
    place = {name: index for index, name in enumerate(ORDER)}
    return sorted(found, key=lambda result: (place.get(result["benchmark"], len(ORDER)), result["benchmark"]))


def short_table(results: list[dict]) -> str:
    """The table of the README: figure, what was measured, target, what the others measured in the same run."""
    lines = ["| | measured | target | others, same run |", "| --- | --- | --- | --- |"]
    sources = []
    for result in results:
        rows = [row for row in result["rows"] if row["figure"] in SHORT]
        for row in rows:
            lines.append(f"| {row['figure']} | {_measured(row)}{_by_hooks(row)} | {_target(row)} | {_beside(row)} |")
        sources += [f"- `{result['command']}`: {_machine(result)}"] if rows else []
    return "\n".join([*lines, "", *sources]) if sources else "No results yet: `make bench`."


def long_table(results: list[dict]) -> str:
    """The tables of docs/benchmarks.md, one for each benchmark."""
    parts = []
    for result in results:
        parts += [f"## {result['benchmark'].replace('_', ' ').capitalize()}", "", f"`{result['command']}`", ""]
        parts += [_machine(result) + _about(result), ""]
        parts += ["| | median | 95 % interval | lowest to highest | target | others, same run | |"]
        parts += ["| --- | --- | --- | --- | --- | --- | --- |"]
        for row in result["rows"]:
            spread = row.get("result") or {}
            several = len(spread.get("rounds", ())) > 1
            interval = f"{_number(spread['low'])} to {_number(spread['high'])}" if several else ""
            extent = f"{_number(spread['min'])} to {_number(spread['max'])}" if several else ""
            cells = (row["figure"], _measured(row), interval, extent, _target(row), _beside(row), row.get("note", ""))
            parts.append(f"| {' | '.join(cells)} |")
        parts.append("")
        for name, reason in result.get("skipped", {}).items():
            parts.append(f"- Left out: {name} ({' '.join(reason.split())})")
        parts += [""] if result.get("skipped") else []
    return "\n".join(parts).strip() or "No results yet: `make bench`."


def _number(figure: float) -> str:
    return f"{figure:.0f}" if figure >= 100 else f"{figure:.1f}" if figure >= 10 else f"{figure:.3f}"


def _unit(row: dict) -> str:
    unit = row.get("unit", "x")
    return unit if unit == "x" else f" {unit}"


def _measured(row: dict) -> str:
    return _number(row["result"]["median"]) + _unit(row) if "result" in row else "not measured"


def _by_hooks(row: dict) -> str:
    return f" ({_number(row['by_hooks']['median'])}x by the time in our code)" if "by_hooks" in row else ""


def _target(row: dict) -> str:
    bounds = [(word, row.get(f"at_{word}")) for word in ("most", "least")]
    texts = [f"at {word} {bound:g}{_unit(row)}" for word, bound in bounds if bound is not None]
    if texts and "result" in row:
        median = row["result"]["median"]
        met = median <= row.get("at_most", float("inf")) and median >= row.get("at_least", float("-inf"))
        texts.append("met" if met else "**missed**")
    return ", ".join(texts)


def _beside(row: dict) -> str:
    return ", ".join(f"{name} {_number(figure)}" for name, figure in row.get("beside", {}).items())


def _machine(result: dict) -> str:
    facts = result["machine"]
    processor = facts.get("gpu") or f"{facts['cpu']}, {facts['cores']} cores"
    return f"{processor}, {facts['threads']} threads, torch {facts['torch']}, {result['date']}"


def _about(result: dict) -> str:
    known = {"benchmark", "command", "date", "machine", "skipped", "rows"}
    return "".join(f"; {name.replace('_', ' ')}: {value}" for name, value in result.items() if name not in known)


def replace_between(text: str, table: str) -> str:
    """
    Puts a table between the markers.

    Raises:
        `ValueError`: If the text has not exactly one pair of them.
    """
    if text.count(START) != 1 or text.count(END) != 1 or text.index(START) > text.index(END):
        raise ValueError(f"The text needs {START} and {END}, once each and in this order.")
    before, _, rest = text.partition(START)
    return f"{before}{START}\n{table}\n{END}{rest.partition(END)[2]}"


def write(results: list[dict], readme: Path, page: Path) -> None:
    """Rewrites both tables; a README without markers is left as it is, and said so."""
    text = readme.read_text(encoding="utf-8")
    if START in text:
        readme.write_text(replace_between(text, short_table(results)), encoding="utf-8")
    else:
        print(f"{readme.name} has no {START}: it is left as it is")
    text = page.read_text(encoding="utf-8") if page.exists() else f"{PREAMBLE}{START}\n{END}\n"
    page.write_text(replace_between(text, long_table(results)), encoding="utf-8")


def main(argv=None) -> None:
    options = argparse.ArgumentParser(description="Writes the tables of README.md and docs/benchmarks.md.")
    options.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    options.add_argument("--readme", type=Path, default=ROOT / "README.md")
    options.add_argument("--page", type=Path, default=ROOT / "docs" / "benchmarks.md")
    args = options.parse_args(argv)
    write(load(args.results), args.readme, args.page)


if __name__ == "__main__":
    main()

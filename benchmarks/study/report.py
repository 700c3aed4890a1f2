"""Writes what a study found: docs/results.md with its plots, and a short table for the README."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from benchmarks.study.figures import DENSE, Estimate, Study, estimate
from benchmarks.study.methods import METHODS
from benchmarks.study.plots import draw
from benchmarks.study.runs import recorded_flags
from hf_admm import ADMMTrainingArguments


START, END = "<!-- results:start -->", "<!-- results:end -->"
README_ROWS = 8
OURS, TAUGHT = "ours", "ours_teacher"
_BESIDE_DENSE = (OURS, TAUGHT, "two_phases", "two_phases_teacher")
_GIVEN = ("sparsity_pattern", "distill_teacher")  # by the place in the study, and by what it trains before
_OF_FURTHER_ROWS = {"sst2": " (some are phrases of sentences that runs do train on)"}
EMPTY = "No results yet: `python -m benchmarks.accuracy`.\n"


def page(lines: Sequence[dict], figures: Sequence[Path] = ()) -> str:
    """
    The text of docs/results.md.

    Args:
        lines (`Sequence[dict]`):
            Those of the results.
        figures (`Sequence[Path]`, *optional*):
            Plots to show, as paths from the page.
    """
    study = Study(lines)
    parts = ["# Results", "", "Written by `python -m benchmarks.accuracy --report` from its results file.", ""]
    if not study.lines:
        return "\n".join([*parts, EMPTY])
    parts += [*_about(study), ""]
    for pattern in study.patterns:
        parts += [f"## {pattern}", "", *_table(study, pattern), "", *_claims(study, pattern), ""]
        parts += [*_on_further_rows(study, pattern), *_convergence(study, pattern), ""]
    parts += [f"![{path.stem.replace('_', ' ')}]({path.as_posix()})\n" for path in figures]
    parts += ["## Methods", "", *_methods(study), "", "## What is missing", "", *_missing(study)]
    return "\n".join(parts).rstrip() + "\n"


def short_table(lines: Sequence[dict]) -> str:
    """
    The README's table: a row for each method and pattern with its metrics and share of dense, at most eight. If there
    are more, those of a single run are the first to be left to the page.
    """
    study = Study(lines)
    if not study.lines:
        return EMPTY.strip()
    metrics = {line["task"]: line["metric"] for line in study.lines}
    found = [("none", study.reference)] if study.reference else []
    others = [(pattern, name) for pattern in study.patterns for name in _sorted(study.methods(pattern))]
    first = (OURS, TAUGHT)  # of every pattern, whatever else there is no room for
    found += sorted(others, key=lambda item: first.index(item[1]) if item[1] in first else len(first))
    if len(found) > README_ROWS:
        found = [(pattern, name) for pattern, name in found if len(study.values(name, pattern)) > 1]
    rows = [f"| | {' | '.join(f'{task} ({metrics[task]})' for task in study.tasks)} | share of dense |"]
    rows.append(f"| --- |{' --- |' * (len(study.tasks) + 1)}")
    for pattern, name in found[:README_ROWS]:
        dense, title = pattern == "none", METHODS[name].title
        cells = [_metric(estimate(study.values(name, pattern, task).values())) for task in study.tasks]
        cells.append("" if dense else _share(study.share(name, pattern)))
        rows.append(f"| {title if dense else f'{title}, {pattern}'} | {' | '.join(cells)} |")
    counted = [
        len({seed for _, seed, _ in study.cell(name, pattern, task)})
        for pattern, name in found
        for task in study.tasks
    ]
    least, most = min(filter(None, counted)), max(counted)
    seeds = f"{least} to {most} seeds a figure" if least < most else _seeds(study)
    if len({line["arguments"]["bf16"] for line in study.lines}) > 1:
        seeds += ", some in float32 and bf16"
    counts = f"{len(study.tasks)} tasks of GLUE, {seeds}"
    two = f"*{METHODS['two_phases'].title}* are the [two phases](docs/guide.md#two-phases-in-a-picture)"
    note = f"*Ours* is the default; {two}.\n{counts}, equal optimizer steps (a teacher's come on top); "
    note += "in brackets 95 % intervals.\n[All results](docs/results.md)."
    return "\n".join([*rows, "", note])


def replace_between(text: str, table: str) -> str:
    """
    Puts the short table between its markers.

    Raises:
        `ValueError`: If the text has not exactly one pair of them.
    """
    if text.count(START) != 1 or text.count(END) != 1 or text.index(START) > text.index(END):
        raise ValueError(f"The text needs {START} and {END}, once each and in this order.")
    before, _, rest = text.partition(START)
    return f"{before}{START}\n{table}\n{END}{rest.partition(END)[2]}"


def write(lines: Sequence[dict], docs: Path, readme: Path) -> None:
    """
    Writes `results.md` and `figures/` in a folder, and the README's table where it has the markers.

    Args:
        lines (`Sequence[dict]`):
            Those of the results.
        docs (`Path`), readme (`Path`):
            The folder and the file.
    """
    study = Study(lines)
    drawn = draw(study, docs / "figures") if study.lines else []
    docs.mkdir(parents=True, exist_ok=True)
    (docs / "results.md").write_text(page(lines, [path.relative_to(docs) for path in drawn]), encoding="utf-8")
    text = readme.read_text(encoding="utf-8")
    if START not in text:
        print(f"{readme.name} has no {START}: it is left as it is")
    elif study.lines:
        readme.write_text(replace_between(text, short_table(lines)), encoding="utf-8")


# ---- The parts ----


def _about(study: Study) -> list[str]:
    machines = sorted({f"{m.get('gpu') or m['cpu']}, {m['threads']} threads" for m in _each(study, "machine")})
    versions = sorted({f"torch {v['torch']}, transformers {v['transformers']}" for v in _each(study, "versions")})
    dates = sorted(line["date"][:10] for line in study.lines)
    precision = " and ".join(sorted({"bf16" if a["bf16"] else "float32" for a in _each(study, "arguments")}))
    models = ", ".join(sorted(set(_each(study, "model"))))
    sources = len(set(_each(study, "source")))
    hours = sum(_each(study, "seconds")) / 3600
    lines = [
        f"{models} on {', '.join(study.tasks)} of GLUE, {_seeds(study)} ({', '.join(map(str, study.seeds))}), "
        f"{precision}; {len(study.lines)} runs, {hours:.1f} hours; {'; '.join(machines)}; {'; '.join(versions)}; "
        f"{dates[0]} to {dates[-1]}. Each figure is that of the saved model as plain `from_pretrained` loads it.",
        "",
        "± is the standard error over seeds and precisions. Differences and shares are paired by task, seed and "
        "precision, with 95 % intervals of Student's t over all pairs; what has no interval is no claim. A method "
        "that was run at several learning rates has its best one, by the mean over seeds on the very data that "
        "judges. Dense is "
        f"{METHODS[study.reference].title if study.reference else 'missing'}.",
    ]
    if sources > 1:
        lines += ["", f"**The runs were made with {sources} states of the library's code.**"]
    if earlier := _earlier_defaults(study):
        lines += ["", f"Not the defaults of today: {', '.join(earlier)}."]
    return lines


def _earlier_defaults(study: Study) -> list[str]:
    """Flags that runs had, though neither their method sets them nor the defaults of today."""
    counts: Counter[str] = Counter()
    for line in study.lines:
        method = METHODS[line["method"]]
        if method.dense:
            continue
        args = ADMMTrainingArguments("unused", sparsity_pattern=line["pattern"], **method.flags)
        now = {name: value for name, value in recorded_flags(args, method.kind).items() if name not in _GIVEN}
        of_method = {name: value for name, value in line["arguments"].items() if name in now}
        counts.update(f"`{k}={v}`" for k, v in of_method.items() if v != now[k] and k not in method.flags)
    return [f"{flag} in {count} runs" for flag, count in sorted(counts.items())]


def _table(study: Study, pattern: str) -> list[str]:
    metrics = {line["task"]: line["metric"] for line in study.lines}
    head = " | ".join(f"{task} ({metrics[task]})" for task in study.tasks)
    rows = [f"| | {head} | share of dense | ours less this, points |", f"| --- |{' --- |' * (len(study.tasks) + 2)}"]
    for name in [*(name for name in DENSE if study.values(name, pattern)), *_sorted(study.methods(pattern))]:
        cells = [_metric(estimate(study.values(name, pattern, task).values())) for task in study.tasks]
        share = "" if name == study.reference else _share(study.share(name, pattern))
        less = "" if name == OURS else _points(study.difference(OURS, name, pattern))
        rows.append(f"| {METHODS[name].title} | {' | '.join(cells)} | {share} | {less} |")
    return rows


def _claims(study: Study, pattern: str) -> list[str]:
    words = {"above": "better than", "below": "worse than", "not told apart": "not told apart from"}
    groups: dict[str, list[str]] = {}
    for name in _sorted(study.methods(pattern)):
        found = study.difference(OURS, name, pattern) if name != OURS else None
        if found:
            said = words.get(found.verdict(), "no interval, so nothing is said, against")
            groups.setdefault(said, []).append(f"{METHODS[name].title} ({_points(found)})")
    lines = [f"- Ours is {said} {', '.join(found)}." for said, found in groups.items()]
    for name in _sorted(study.methods(pattern)):
        lines += _by_task(study, OURS, name, pattern, "Ours by task, less") if name != OURS else []
    lines += _by_task(study, "layerwise", "sparsegpt", pattern, "Layer-wise ADMM by task, less")
    by_task = {task: study.difference("two_phases", "rho0", pattern, task) for task in study.tasks}
    if len(by_task := {task: found for task, found in by_task.items() if found}) > 1:
        shown = "; ".join(f"{task} {_points(found)}" for task, found in by_task.items())
        titles = f"{METHODS['two_phases'].title} less {METHODS['rho0'].title}"
        lines.append(f"- What ADMM adds in phase 1, {titles}: {shown}.")
    ours = [name for name in _BESIDE_DENSE if name in study.methods(pattern)]
    return [*(line for name in ours for line in _beside_dense(study, name, pattern)), *lines] or [
        "- Nothing to compare yet."
    ]


def _by_task(study: Study, name: str, other: str, pattern: str, said: str) -> list[str]:
    """Differences task by task, on the dev sets and on the further rows, where there are several pairs."""
    parts = []
    for task in study.tasks:
        for further, rows in ((False, ""), (True, ", further rows")):
            found = study.difference(name, other, pattern, task, further)
            if found and found.low is not None:
                parts.append(f"{task}{rows} {_points(found)}")
    return [f"- {said} {METHODS[other].title}: {'; '.join(parts)}."] if parts else []


def _beside_dense(study: Study, name: str, pattern: str) -> list[str]:
    """Both ways to compare: a share weighs a task by its score, points weigh all tasks alike."""
    share, less = study.share(name, pattern), study.difference(name, study.reference, pattern)
    if not share or share.low is None or not less:
        return []
    words = {"above": "above dense", "below": "below dense"}
    said = [words.get(found, "not told apart from dense") for found in (share.verdict(1.0), less.verdict())]
    return [
        f"- {METHODS[name].title}: {_share(share)} of the dense metric, {said[0]}; {_points(less)} points, {said[1]}."
    ]


def _on_further_rows(study: Study, pattern: str) -> list[str]:
    """A table for each task that was judged on more rows than its dev set has, with the differences on them."""
    parts = []
    for task in study.tasks:
        names = [*DENSE, *_sorted(study.methods(pattern))]
        found = {name: study.values(name, pattern, task, further=True) for name in names}
        found = {name: values for name, values in found.items() if values}
        if not any(name not in DENSE for name in found):
            continue
        lines = [line for line in study.lines if line["task"] == task and line.get("further")]
        parts += [
            f"On {max(line['further']['rows'] for line in lines):,} further rows of {task}'s training file, which no "
            f"run trains on and no default was chosen by{_OF_FURTHER_ROWS.get(task, '')}:",
            "",
            f"| | {task} ({lines[0]['metric']}) | seeds | ours less this, points |",
            "| --- | --- | --- | --- |",
        ]
        for name, values in found.items():
            less = "" if name == OURS else _points(study.difference(OURS, name, pattern, task, further=True))
            cells = [METHODS[name].title, _metric(estimate(values.values())), len(values), less]
            parts.append(f"| {' | '.join(map(str, cells))} |")
        parts.append("")
    return parts


def _convergence(study: Study, pattern: str) -> list[str]:
    figures = ("cut_start", "cut_switch", "primal_switch", "flips_mean", "flips_most", "share_of_final")
    rows = []
    for name in _sorted(study.methods(pattern)):
        for task in study.tasks:
            phases = [line["phase_1"] for line in study.cell(name, pattern, task).values() if line["phase_1"]]
            taken = [[phase[f] for phase in phases if phase.get(f) is not None] for f in figures]
            if any(taken):
                cells = [f"{100 * sum(v) / len(v):.3g} %" if v else "" for v in taken]
                rows.append(f"| {METHODS[name].title} | {task} | {' | '.join(cells)} |")
    if not rows:
        return []
    return [
        "Phase 1, means over seeds. *Cut* is ‖W − Π(W)‖ / ‖W‖, what the switch takes away unless it prunes by "
        "the data. *Flips* are the masks' at an update of the last third, mean and most. *Before the switch* is the "
        "metric of the projected model right before it, as a share of the final one.",
        "",
        "| | task | cut at start | cut at switch | primal residual | flips | most | before the switch |",
        f"| --- |{' --- |' * 7}",
        *rows,
    ]


def _methods(study: Study) -> list[str]:
    lines = []
    for name, method in METHODS.items():
        tried = sorted({rate for cell, rates in study.rates.items() if cell[0] == name for rate in rates})
        if not tried:
            continue
        best = {line["task"]: line["rate"] for line in study.lines if line["method"] == name}
        rates = ""
        if tried != [1.0]:  # also where the other rate of a method was not run
            chosen = ", ".join(f"{task} {rate:g}" for task, rate in sorted(best.items()))
            rates = f" Rates run: {', '.join(f'{rate:g}' for rate in tried)} times the task's; taken: {chosen}."
        lines.append(f"- **{method.title}**: {method.about}.{rates}")
    return lines


def _missing(study: Study) -> list[str]:
    run = {line["method"] for line in study.lines}
    never = [method.title for name, method in METHODS.items() if name not in run]
    lines = [f"- Never run: {', '.join(never)}."] if never else []
    lines += [f"- Not run: {gap}." for gap in study.missing([name for name in METHODS if name in run])]
    lines += [f"- Undefined metric: {x['method']}, {x['task']}, seed {x['seed']}." for x in study.undefined]
    broken = [line for line in study.lines if line["broken_groups"]]
    lines += [f"- **{x['broken_groups']} broken groups**: {x['method']}, {x['task']}." for x in broken]
    lines += [f"- Left out: {count} {what}." for what, count in study.unused.items() if count]
    if len(study.seeds) < 3:
        lines.append(f"- Only {_seeds(study)}: intervals of so few are wide, or not there.")
    return lines or ["- Nothing: every method has every task, pattern and seed."]


def _sorted(names: Sequence[str]) -> list[str]:
    return sorted(names, key=list(METHODS).index)


def _each(study: Study, name: str) -> list:
    return [line[name] for line in study.lines]


def _seeds(study: Study) -> str:
    return f"{len(study.seeds)} seed{'s' if len(study.seeds) != 1 else ''}"


def _metric(found: Estimate | None) -> str:
    if found is None:
        return ""
    return f"{100 * found.mean:.2f}" + (f" ± {100 * found.error:.2f}" if found.error is not None else "")


def _points(found: Estimate | None) -> str:
    if found is None:
        return ""
    if found.low is None:
        return f"{found.mean:+.2f}, no interval"
    return f"{found.mean:+.2f} [{found.low:+.2f}, {found.high:+.2f}]"


def _share(found: Estimate | None) -> str:
    if found is None:
        return ""
    if found.low is None:
        return f"{found.mean:.1%}, no interval"
    return f"{found.mean:.1%} [{100 * found.low:.1f}, {100 * found.high:.1f}]"

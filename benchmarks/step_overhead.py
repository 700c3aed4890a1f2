"""
Time of an optimizer step beside plain `Trainer`: the same model, data and batch, real trainers that take turns.

A round is one step of each contender, in a new order. Two figures of each phase: the median of the rounds' ratios to
plain `Trainer`, and `step / (step - hooks)` with the seconds that the run spent in our own code, which the noise of a
shared machine hardly touches. Phase 1 is timed in the part that pulls. The update of the mask, due in both phases once
in a 24th of phase 1, is made more often here, and its extra time counted as if spread over the 14 steps that this is
in a phase of 345 (`trainers.spread`).
"""

import random
import re
import statistics
import time
import warnings

import torch
from transformers.utils import logging

from benchmarks.common import parser, ratios, row, show, summary, write_result
from benchmarks.trainers import FIRST_STEPS, PEERS, PHASES, Turns, minilm, spread


CASES = ("32x32", "32x128", "32x32/4")
AT_MOST = {"32x32": {"phase 1": 1.03, "phase 2": 1.05}, "32x128": {"phase 1": 1.01, "phase 2": 1.02}}
PERIOD = 14  # admm_update_steps where phase 1 has 345 steps, as on MRPC; longer in longer runs
MEASURED_PERIOD = 8  # the update costs the same whenever it comes, and so a short run has several
WARMUP = 2


def measure(case: str, model, steps: int, names=(*PHASES, *PEERS), seed: int = 0, minutes: float = 60):
    """
    All contenders in one case.

    Args:
        case (`str`):
            `"BATCHxTOKENS"`, or `"BATCHxTOKENS/ACCUMULATION"`.
        model (`nn.Module`):
            A text classifier.
        steps (`int`):
            Optimizer steps that are timed.
        names (`Sequence[str]`, *optional*):
            The contenders beside plain `Trainer`.
        seed (`int`, *optional*, defaults to 0):
            Of the orders.
        minutes (`float`, *optional*, defaults to 60):
            After which no further round begins, once there was an update of the mask.

    Returns:
        `list[dict]`, `dict[str, str]`: The rows, and what was left out with the reason.
    """
    batch, tokens, accumulation = (int(part or 1) for part in re.fullmatch(r"(\d+)x(\d+)/?(\d*)", case).groups())
    flags = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    flags["ours"] = {"admm_update_steps": MEASURED_PERIOD}
    turns, left_out = {name: Turns(name, model, tokens, **flags) for name in ("plain", *names)}, {}
    try:
        for name in list(turns):
            try:
                turns[name].ready()
            except ImportError as error:
                left_out[name] = f"{type(error).__name__}: {error}"
                turns.pop(name).stop()
        times = _rotate(turns, steps, seed, minutes)
    finally:
        for turn in turns.values():
            turn.stop()
    return _rows(case, times), left_out


def _rotate(turns: dict[str, Turns], steps: int, seed: int, minutes: float) -> dict:
    order, shuffle = list(turns), random.Random(seed).shuffle
    times = {name: {"wall": [], "cpu": [], "hooks": [], "due": []} for name in turns}
    end = time.monotonic() + 60 * minutes
    for index in range(WARMUP + steps):
        if index > 2 * MEASURED_PERIOD and time.monotonic() > end:
            break
        shuffle(order)
        for name in order:
            since = index - FIRST_STEPS.get(name, 0)
            figures = turns[name].step() | {"due": since > 0 and since % MEASURED_PERIOD == 0}
            if index >= WARMUP:
                for kind, figure in figures.items():
                    times[name][kind].append(figure)
    return times


def _rows(case: str, times: dict) -> list[dict]:
    plain, rows = times["plain"], []
    others = {name: statistics.median(ratios(t["wall"], plain["wall"])) for name, t in times.items() if name in PEERS}
    for name in PHASES:
        if name not in times:
            continue
        own = times[name]
        wall, cpu, hooks = own["wall"], own["cpu"], own["hooks"]
        cpu, _ = spread(cpu, hooks, own["due"], PERIOD)
        wall, hooks = spread(wall, hooks, own["due"], PERIOD)
        in_hooks = [step / (step - hook) for step, hook in zip(wall, hooks, strict=True)]
        target = {"at_most": AT_MOST[case][name]} if case in AT_MOST else {}
        figure = f"step of {name}, batch {case.replace('/', ', accumulation ')}"
        rows.append(
            row(
                figure,
                ratios(wall, plain["wall"]),
                **target,
                beside=others,
                note=f"by the time in our own code: {statistics.median(in_hooks):.4f}",
                by_hooks=summary(in_hooks),
                cpu_time=summary(ratios(cpu, plain["cpu"])),
                # What is left of the noise when only the quieter half of each contender's steps counts.
                lower_quartiles=_lower_quartile(wall) / _lower_quartile(plain["wall"]),
                milliseconds={"plain": 1e3 * statistics.median(plain["wall"]), name: 1e3 * statistics.median(wall)},
                milliseconds_in_hooks=1e3 * statistics.median(hooks),
            )
        )
    for name in others:
        rows.append(
            row(f"step of {name}, batch {case}", ratios(times[name]["wall"], plain["wall"]))
            | {"cpu_time": summary(ratios(times[name]["cpu"], plain["cpu"]))}
        )
    return rows


def _lower_quartile(values) -> float:
    return statistics.quantiles(values, n=4)[0]


def main(argv=None) -> None:
    options = parser("Times optimizer steps beside plain Trainer and beside peers.")
    options.add_argument("--cases", nargs="+", default=list(CASES), help="BATCHxTOKENS or BATCHxTOKENS/ACCUMULATION")
    options.add_argument("--steps", type=int, default=60, help="timed steps of each contender")
    options.add_argument("--minutes", type=float, default=6, help="for a case, after which it is cut short")
    options.add_argument("--no_peers", action="store_true")
    options.add_argument("--seed", type=int, default=0, help="of the orders")
    args = options.parse_args(argv)
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    model, label = minilm()
    names = tuple(PHASES) if args.no_peers else (*PHASES, *PEERS)
    rows, skipped = [], {}
    for case in args.cases:
        measured, left_out = measure(case, model, args.steps, names, args.seed, args.minutes)
        show(measured)
        rows += measured
        skipped |= left_out
    write_result("step_overhead", args.output_dir, args.threads, rows, skipped, model=label)


if __name__ == "__main__":
    main()

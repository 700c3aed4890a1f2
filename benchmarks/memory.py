"""
Memory of training beside plain `Trainer`, each contender in a process of its own.

- **State**: bytes held at the end of a step beyond those that plain `Trainer` holds, per byte of the pruned weights.
- **Peak**: the most bytes allocated at once within steps in which everything happens (the updates of Z and U, of the
  mask), without the state, per peak of plain `Trainer`.

Both come from the allocations themselves: the profiler records each one on the CPU, from before the model is built;
on a GPU its allocator counts. The growth of the process (resident set) within the same steps is reported beside them:
it alone holds what NumPy allocates, the packed masks and some 2 MiB of buffers.
"""

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import warnings
from contextlib import nullcontext
from pathlib import Path

import torch
from transformers import TrainerCallback
from transformers.utils import logging

from benchmarks.common import MIB, parser, row, show, write_result
from benchmarks.trainers import PEERS, Tokens, build, minilm, pruned_names
from hf_admm.pruning.phases import Phase
from hf_admm.pruning.swapping import SwappedParameters
from hf_admm.pruning.weights import PrunedWeights


FIRST, LAST = 2, 6  # the steps that are watched: the first ones allocate gradients and the optimizer's state
DUAL, BFLOAT16 = "phase 1, admm_penalty loss", "phase 1, admm_penalty loss, admm_state_dtype bfloat16"
OURS = {"phase 1": "phase 1", DUAL: "phase 1", BFLOAT16: "phase 1", "phase 2": "phase 2"}
FLAGS = {DUAL: {"admm_penalty": "loss"}, BFLOAT16: {"admm_penalty": "loss", "admm_state_dtype": "bfloat16"}}
STATE_AT_MOST = {"phase 1": 0.05, DUAL: 1.05, BFLOAT16: 0.55, "phase 2": 1.05}


class Watch(TrainerCallback):
    """Marks the watched steps: between them the trace is read, and the peak of the process is its own."""

    def __init__(self):
        self.resident, self.held = 0, 0
        self.region = torch.profiler.record_function("watched")

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == FIRST:
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            self.resident = _reset_resident_peak()
            self.region.__enter__()
        if state.global_step == LAST:
            gc.collect()  # so that what is live is what is held
            self.region.__exit__(None, None, None)
            self.resident = _resident("VmHWM") - self.resident if self.resident else 0
            self.held = held(kwargs.get("sparsity")) if kwargs.get("sparsity") else 0


def _resident(field: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(field)), 0)


def _reset_resident_peak() -> int:
    """Starts the peak of the resident set anew; 0 where that is not allowed."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:
        return 0
    return _resident("VmRSS")


def held(sparsity) -> int:
    """Bytes of the tensors that `trainer.sparsity` holds, each storage once, without the model's own."""
    own = {parameter.untyped_storage().data_ptr() for parameter in sparsity.weights.model.parameters()}
    storages, waiting = {}, [vars(sparsity)]
    while waiting:
        value = waiting.pop()
        if isinstance(value, torch.Tensor):
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, Phase | PrunedWeights | SwappedParameters):
            waiting.append(vars(value))
        elif isinstance(value, list | tuple | set):
            waiting += value
    return sum(size for pointer, size in storages.items() if pointer not in own)


def watch(name: str, batch: int, tokens: int, model=None) -> dict:
    """
    Trains one contender for a few steps.

    Returns:
        `dict`: Bytes: `live` at the end of a watched step, `peak` within them, `held` by our state, `resident` growth,
        and `pruned`, those of the pruned weights.
    """
    cuda, marks = torch.cuda.is_available(), Watch()
    gc.collect()
    activities = [torch.profiler.ProfilerActivity.CPU]
    tracing = nullcontext() if cuda else torch.profiler.profile(activities=activities, profile_memory=True)
    with tempfile.TemporaryDirectory() as folder, tracing as profile:
        if model is None:
            # The weights come from a file that is mapped into memory; a copy makes them allocations like any other.
            model = minilm()[0]
        flags = {"admm_update_steps": 2} | FLAGS.get(name, {})
        settings = {"per_device_train_batch_size": batch, "logging_steps": 1}
        data = Tokens(tokens, model.config.vocab_size)
        trainer = build(OURS.get(name, name), model, data, folder, flags, **settings)
        names = pruned_names(model)
        pruned = sum(model.get_parameter(weight).nbytes for weight in names)
        del model
        marks.on_step_end = _ending(marks, trainer)
        trainer.add_callback(marks)
        trainer.train()
    live, peak = (0, torch.cuda.max_memory_allocated()) if cuda else _from_trace(profile)
    return {"live": live, "peak": peak, "held": marks.held, "resident": marks.resident, "pruned": pruned}


def _ending(marks: Watch, trainer):
    """`on_step_end` with the state of the trainer at hand, and the end of the run behind the watched steps."""
    watched = type(marks).on_step_end

    def on_step_end(args, state, control, **kwargs):
        watched(marks, args, state, control, sparsity=getattr(trainer, "sparsity", None))
        control.should_training_stop = state.global_step == LAST

    return on_step_end


def _from_trace(profile) -> tuple[int, int]:
    """The bytes allocated at the end of the watched steps, and the most within them."""
    events = profile.profiler.kineto_results.events()
    (region,) = (event for event in events if event.name() == "watched")
    start, end = region.start_ns(), region.start_ns() + region.duration_ns()
    allocations = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    total, peak = 0, 0
    for moment, size in allocations:
        if moment > end:
            break
        if moment >= start:
            peak = max(peak, total)
        total += size
    return total, max(peak, total)


def compare(figures: dict[str, dict]) -> list[dict]:
    """The rows, from what [`watch`] found for each contender."""
    plain, rows = figures["plain"], []

    def state(own):
        return max(own["live"] - plain["live"], own["held"]) / own["pruned"]  # the trace misses what NumPy allocates

    def peak(own):
        extra = own["live"] - plain["live"] if own["live"] else own["held"]
        return (own["peak"] - extra) / plain["peak"]

    rivals = {name: own for name, own in figures.items() if name in PEERS}
    for name in (name for name in OURS if name in figures):
        own = figures[name]
        note = f"{own['held'] / own['pruned']:.3f} by the tensors of the state"
        others = {other: state(found) for other, found in rivals.items()}
        at_most = STATE_AT_MOST[name]
        rows.append(row(f"state of {name}", [state(own)], at_most=at_most, beside=others, note=note, bytes=own))
    for name in (name for name in OURS if name in figures):
        own = figures[name]
        note = f"whole peak {own['peak'] / plain['peak']:.3f} x"
        if own["resident"] and plain["resident"]:
            note += f", growth of the process {own['resident'] / MIB:.0f} MiB, plain {plain['resident'] / MIB:.0f}"
        others = {other: peak(found) for other, found in rivals.items()}
        rows.append(row(f"peak of {name} without the state", [peak(own)], at_most=1.02, beside=others, note=note))
    return rows


def main(argv=None) -> None:
    options = parser("Measures the memory of training beside plain Trainer and peers.")
    options.add_argument("--batch", type=int, default=32)
    options.add_argument("--tokens", type=int, default=32)
    options.add_argument("--contender", help=argparse.SUPPRESS)
    args = options.parse_args(argv)
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    if args.contender:
        print("\n" + json.dumps(watch(args.contender, args.batch, args.tokens)))
        return
    figures, skipped = {}, {}
    for name in ("plain", *OURS, *PEERS):
        command = [sys.executable, "-m", "benchmarks.memory", "--contender", name, "--threads", str(args.threads)]
        command += ["--batch", str(args.batch), "--tokens", str(args.tokens)]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode:
            skipped[name] = run.stderr.strip().splitlines()[-1]
            print(f"  {name}: {skipped[name]}", flush=True)
        else:
            figures[name] = json.loads(run.stdout.splitlines()[-1])
    rows = compare(figures)
    show(rows)
    batch = f"{args.batch} x {args.tokens}"
    write_result("memory", args.output_dir, args.threads, rows, skipped, model=minilm()[1], batch=batch, bytes=figures)


if __name__ == "__main__":
    main()

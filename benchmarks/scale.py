"""
What changes with the size of the model: Llama models built from configs, on few tokens for a few steps.

Each size is trained by plain `Trainer` and by ours, in processes of their own: nanoseconds that our code takes per
pruned parameter and step, bytes of the state per byte of the pruned weights, seconds from the start of the process to
the end of the first step, seconds and bytes of a checkpoint. AdamW, but SGD without momentum for the largest, whose
AdamW state would need memory that is not to be measured.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

from benchmarks.common import now, parser, row, show, write_result
from benchmarks.memory import held
from benchmarks.trainers import HookTimer, Tokens, pruned_names, spread
from hf_admm import ADMMTrainer, ADMMTrainingArguments


# Width and layers; a layer has 16 * width ** 2 parameters.
SIZES = {"10m": (256, 9), "50m": (512, 12), "300m": (1024, 18), "1b": (2048, 15)}
PERIOD = 64  # admm_update_steps: its cost, measured at shorter intervals, is spread over that many steps
SWITCH, LAST = 5, 9  # of the steps: phase 1 up to the first
# Bytes for each byte of the weights that a run needs at most, with the optimizer's state and a save within it.
ROOM = {"adamw_torch_fused": 7, "sgd": 5}
PHASES = ("phase 1", "phase 2")


def llama(width: int, layers: int) -> LlamaForCausalLM:
    """A Llama model with random weights and a vocabulary so small that it hardly counts."""
    heads = max(1, width // 64)
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    config = LlamaConfig(vocab_size=1000, num_attention_heads=heads, max_position_embeddings=256, **sizes)
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


class Clock(TrainerCallback):
    """When the steps and the saves end, and what our code and our state took until then."""

    def __init__(self):
        self.steps, self.hooks, self.saves, self.held = [], [], [], []
        self.sparsity = self.timer = None
        self.last = 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        self.last = self.last or now()

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append(now())
        if self.timer:
            self.hooks.append(self.timer.take())
            self.held.append(held(self.sparsity))
        self.last = now()

    def on_save(self, args, state, control, **kwargs):
        self.saves.append(now() - self.last)
        if self.timer:
            self.timer.take()


def train(kind: str, width: int, layers: int, optimizer: str, started: float) -> dict:
    """
    Trains one model for a few steps, with a checkpoint in each phase.

    Args:
        kind (`str`):
            `"plain"` or `"ours"`.
        width, layers (`int`):
            Of the model.
        optimizer (`str`):
            As `optim` takes it.
        started (`float`):
            `time.time()` at the start of the process.

    Returns:
        `dict`: What [`Clock`] saw.
    """
    clock = Clock()
    model = llama(width, layers)
    data = Tokens(16, model.config.vocab_size, labels=None)
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "output_dir": folder,
            "optim": optimizer,
            "per_device_train_batch_size": 1,
            "max_steps": LAST,
            "save_steps": 4,
            "save_total_limit": 1,
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": not torch.cuda.is_available(),
        }
        if kind == "ours":
            flags = {"admm_penalty": "loss", "admm_steps": SWITCH, "admm_update_steps": 2, "mask_freeze_steps": 0}
            trainer = ADMMTrainer(model, ADMMTrainingArguments(**settings, **flags), train_dataset=data)
            clock.timer, clock.sparsity = HookTimer(trainer), trainer.sparsity
        else:
            trainer = Trainer(model, TrainingArguments(**settings), train_dataset=data)
        trainer.add_callback(clock)
        before = time.time() - now()  # from the clock of the steps to that of the start
        trainer.train()
        first = clock.steps[0] + before - started
        (checkpoint,) = Path(folder).glob("checkpoint-*")
        files = {path.name: path.stat().st_size for path in sorted(checkpoint.iterdir())}
    names = pruned_names(model)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "pruned": sum(model.get_parameter(name).numel() for name in names),
        "pruned_bytes": sum(model.get_parameter(name).nbytes for name in names),
        "first_step": first,
        "saves": clock.saves,
        "files": files,
        "hooks": clock.hooks,
        "held": clock.held,
    }


def compare(size: str, optimizer: str, plain: list[dict], ours: list[dict]) -> list[dict]:
    """The rows of one size, from the runs of both, each as often."""
    rows, label = [], f"{ours[0]['parameters'] / 1e6:,.0f} M parameters"
    for phase in PHASES:
        per_parameter, state = [], []
        for run in ours:
            steps = range(1, SWITCH) if phase == "phase 1" else range(SWITCH + 1, LAST)
            hooks = [run["hooks"][i] for i in steps]
            if phase == "phase 1":
                _, hooks = spread(hooks, hooks, [i % 2 == 0 for i in steps], PERIOD)
            per_parameter.append(1e9 * statistics.median(hooks) / run["pruned"])
            state.append(run["held"][SWITCH - 1 if phase == "phase 1" else LAST - 1] / run["pruned_bytes"])
        note = f"per pruned parameter; {optimizer}"
        rows.append(row(f"our code in a step of {phase}, {label}", per_parameter, unit="ns", note=note))
        rows.append(row(f"state of {phase}, {label}", state, at_most=1.05))
    starts = [a["first_step"] / b["first_step"] for a, b in zip(ours, plain, strict=True)]
    note = f"{statistics.median([run['first_step'] for run in ours]):.1f} s"
    rows.append(row(f"process start to the end of the first step, {label}", starts, note=note))
    for index, phase in enumerate(PHASES):
        saves = [a["saves"][index] / b["saves"][index] for a, b in zip(ours, plain, strict=True)]
        note = f"{statistics.median([run['saves'][index] for run in ours]):.2f} s"
        rows.append(row(f"time of a checkpoint in {phase}, {label}", saves, note=note))
    sizes = [sum(a["files"].values()) / sum(b["files"].values()) for a, b in zip(ours, plain, strict=True)]
    rows.append(row(f"size of a checkpoint, {label}", sizes, files=ours[0]["files"]))
    for entry in rows:
        entry["size"] = size
    return rows


def _available_bytes() -> int:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def main(argv=None) -> None:
    options = parser("Measures cost per parameter, start and checkpoints for models of several sizes.")
    options.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    options.add_argument("--repeats", type=int, default=3, help="runs of each; 1 for sizes above 100m")
    options.add_argument("--run", help=argparse.SUPPRESS)
    options.add_argument("--started", type=float, help=argparse.SUPPRESS)
    args = options.parse_args(argv)
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    optimizers = {size: "sgd" if size == "1b" else "adamw_torch_fused" for size in SIZES}
    if args.run:
        (size,) = args.sizes
        print("\n" + json.dumps(train(args.run, *SIZES[size], optimizers[size], args.started)))
        return
    rows, skipped = [], {}
    for size in args.sizes:
        (width, layers), optimizer = SIZES[size], optimizers[size]
        needed = ROOM[optimizer] * 4 * 16 * width**2 * layers
        if not torch.cuda.is_available() and needed > _available_bytes():
            skipped[size] = f"needs {needed / 2**30:.0f} GiB of memory, {_available_bytes() / 2**30:.0f} are free"
            print(f"  {size}: {skipped[size]}", flush=True)
            continue
        runs = {"plain": [], "ours": []}
        try:
            for _ in range(args.repeats if size in ("10m", "50m") else 1):
                for kind in runs:
                    runs[kind].append(_process(kind, size, args.threads))
        except RuntimeError as error:
            skipped[size] = str(error)
            print(f"  {size}: {error}", flush=True)
            continue
        measured = compare(size, optimizer, runs["plain"], runs["ours"])
        show(measured)
        rows += measured
    write_result("scale", args.output_dir, args.threads, rows, skipped, batch="1 x 16", repeats=args.repeats)


def _process(kind: str, size: str, threads: int) -> dict:
    command = [sys.executable, "-m", "benchmarks.scale", "--run", kind, "--sizes", size, "--threads", str(threads)]
    run = subprocess.run([*command, "--started", repr(time.time())], capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError((run.stderr.strip().splitlines() or [f"exit status {run.returncode}"])[-1])
    return json.loads(run.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()

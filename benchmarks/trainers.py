"""Models, data and real `Trainer`s for the benchmarks: several that take turns, and the time spent in our own code."""

import copy
import inspect
import multiprocessing
import statistics
import tempfile
import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import wraps
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import AutoModelForSequenceClassification, BertConfig, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

from benchmarks import peers
from benchmarks.common import now
from hf_admm import ADMMTrainer, ADMMTrainingArguments, parse_pattern, select_targets
from hf_admm.commands.quickstart import MODEL_PACKAGE
from hf_admm.finetuning.results import MODEL_FOLDER
from hf_admm.finetuning.tweets import packaged_file


LABELS = 3
_LONG = 1_000_000  # steps: a run is ended by hand, long before its schedule
# Phases of our own, for ever; phase 1 as it is while it pulls, phase 2 after a single step of that.
PHASES = {
    "phase 1": {"admm_steps": _LONG},
    "phase 2": {"admm_steps": 1, "mask_freeze_steps": 0},
}
FIRST_STEPS = {"phase 1": 0, "phase 2": PHASES["phase 2"]["admm_steps"]}
PEERS = ("PAT", "SR-STE in autograd", "penalty in autograd")


class PullingArguments(ADMMTrainingArguments):
    """Those of a run whose phase 1 pulls from its first step on, not in its last part alone."""

    def phase_plan(self, max_steps: int):
        return replace(super().phase_plan(max_steps), pull_start=0.0)


class Tokens(Dataset):
    """Random tokens without padding, more examples than a benchmark gets through in an epoch."""

    def __init__(self, length: int, vocabulary: int, labels: int | None = LABELS, size: int = 2**16):
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(5, vocabulary, (1024, length), generator=generator)
        self.size, self.examples = size, []
        for row in tokens:
            example = {"input_ids": row, "attention_mask": torch.ones_like(row)}
            self.examples.append(example | {"labels": row if labels is None else row[0] % labels})

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict:
        return self.examples[index % len(self.examples)]


def minilm(labels: int = LABELS) -> tuple[nn.Module, str]:
    """
    all-MiniLM-L6-v2 from its package, or one of its size with random weights.

    Returns:
        `nn.Module`, `str`: The model, and which it is.
    """
    try:
        folder = packaged_file(MODEL_PACKAGE, Path(MODEL_FOLDER))
    except ValueError:
        sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
        config = BertConfig(num_labels=labels, **sizes)
        return AutoModelForSequenceClassification.from_config(config), "as all-MiniLM-L6-v2, random weights"
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=labels), "all-MiniLM-L6-v2"


def pruned_names(model: nn.Module, pattern: str = "2:4") -> list[str]:
    """The weights that the trainer prunes by default."""
    return list(select_targets(model, parse_pattern(pattern)).targets)


def build(name: str, model: nn.Module, data: Dataset, folder: str, ours: dict | None = None, **flags) -> Trainer:
    """
    A trainer that has not trained yet.

    Args:
        name (`str`):
            `"plain"`, one of `PHASES` or one of `PEERS`.
        model (`nn.Module`):
            Copied.
        data (`Dataset`):
            To train on.
        folder (`str`):
            The output folder.
        ours (`dict`, *optional*):
            Flags of our own beyond those of the phase.
        flags:
            Of `TrainingArguments`.
    """
    settings = {
        "output_dir": folder,
        "max_steps": _LONG,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "use_cpu": not torch.cuda.is_available(),
        **flags,
    }
    model = copy.deepcopy(model)
    if name in PHASES:
        args = PullingArguments(**settings, **PHASES[name], **(ours or {}))
        return ADMMTrainer(model=model, args=args, train_dataset=data)
    args, names = TrainingArguments(**settings), pruned_names(model)
    if name == "PAT":
        return Trainer(model, args, train_dataset=data, optimizers=(peers.pat_optimizer(model, names, args), None))
    if name == "SR-STE in autograd":
        peers.use_sparse_ste(model, names)
    if name == "penalty in autograd":
        trainer = peers.AutogradPenaltyTrainer(model, args, train_dataset=data)
        trainer.hold(names)
        return trainer
    return Trainer(model, args, train_dataset=data)


class HookTimer:
    """
    Counts the seconds that a run of ours spends in our own code: in our callbacks and in the public methods of
    `trainer.sparsity`, each once however they call each other. What our code costs beyond that (two checks for finite
    numbers, a colder cache) shows only in the ratio to plain `Trainer`.

    Args:
        trainer (`ADMMTrainer`):
            One that has not trained yet.
    """

    def __init__(self, trainer: ADMMTrainer):
        self.seconds, self._depth = 0.0, 0
        for callback in trainer.callback_handler.callbacks:
            if type(callback).__module__.startswith("hf_admm"):
                self._wrap(callback, "on_", TrainerCallback)
        self._wrap(trainer.sparsity, "", object)

    def _wrap(self, owner: object, prefix: str, base: type) -> None:
        for name, function in inspect.getmembers(type(owner), inspect.isfunction):
            inherited = function is getattr(base, name, None)
            lazy = inspect.isgeneratorfunction(inspect.unwrap(function))  # its time passes where it is used
            if name.startswith(prefix) and not name.startswith("_") and not inherited and not lazy:
                setattr(owner, name, self._timed(getattr(owner, name)))

    def _timed(self, method):
        @wraps(method)
        def timed(*args, **kwargs):
            if self._depth:
                return method(*args, **kwargs)
            self._depth, start = 1, now()
            try:
                return method(*args, **kwargs)
            finally:
                self.seconds += now() - start
                self._depth = 0

        return timed

    def take(self) -> float:
        """The seconds since the last call."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds


class Turns:
    """
    A trainer that trains an optimizer step at a time, when it is told to, in a process of its own that waits for the
    next turn at the end of each step. So several take turns, each in Trainer's own loop, and none is slowed down by
    what the others have allocated or by their threads. A turn is a whole step: fetching the batch, forward, backward,
    optimizer, every callback.

    Args:
        name (`str`):
            As [`build`] takes it.
        model (`nn.Module`):
            Copied.
        length (`int`):
            Tokens of an example.
        flags:
            As [`build`] takes them.
    """

    def __init__(self, name: str, model: nn.Module, length: int, **flags):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        settings = (name, model, length, torch.get_num_threads(), flags)
        self._process = context.Process(target=_take_turns, args=(theirs, *settings), daemon=True)
        self._process.start()
        theirs.close()

    def ready(self) -> None:
        """Waits until the trainer is made, and raises what came in between."""
        self._answer()

    def step(self) -> dict[str, float]:
        """Trains for one optimizer step: its seconds, `wall`, `cpu` (all threads) and `hooks` (our own code)."""
        self._pipe.send("step")
        return self._answer()

    def _answer(self):
        answer = self._pipe.recv()
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def stop(self) -> None:
        """Ends the run and its process."""
        self._pipe.close()
        self._process.join()


class _Baton(TrainerCallback):
    """The other side of [`Turns`]: the last of the callbacks, so a turn holds what all others do."""

    def __init__(self, pipe, timer: "HookTimer | None"):
        self.pipe, self.timer = pipe, timer

    def wait(self) -> None:
        self.pipe.recv()  # EOFError when the run is to end
        self.wall, self.cpu = now(), time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        taken = {"wall": now() - self.wall, "cpu": time.process_time() - self.cpu}
        self.pipe.send(taken | {"hooks": self.timer.take() if self.timer else 0.0})
        self.wait()


def _take_turns(pipe, name: str, model: nn.Module, length: int, threads: int, flags: dict) -> None:
    torch.set_num_threads(threads)
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder, suppress(EOFError, BrokenPipeError):
        try:
            trainer = build(name, model, Tokens(length, model.config.vocab_size), folder, **flags)
            baton = _Baton(pipe, HookTimer(trainer) if name in PHASES else None)
            trainer.add_callback(baton)
            pipe.send("ready")
            baton.wait()
            trainer.train()
        except (EOFError, BrokenPipeError):
            raise
        except Exception as error:
            pipe.send(type(error)(str(error)))


def spread(seconds: Sequence[float], hooks: Sequence[float], due: Sequence[bool], period: int):
    """
    Spreads what is due once in `period` steps evenly over all steps, so that few steps need to be measured.

    Args:
        seconds, hooks (`Sequence[float]`):
            Of each step, and those of them in our own code.
        due (`Sequence[bool]`):
            Whether the step made the update.
        period (`int`):
            Steps between two updates.

    Returns:
        `list[float]`, `list[float]`: `seconds` and `hooks` with the extra time of the steps that are due taken out and
        `1 / period` of its mean put on every one.

    Raises:
        `ValueError`: If no step was due.
    """
    if not any(due):
        raise ValueError(f"No update of Z and U within {len(due)} steps: measure more, it comes every {period} steps.")
    usual = statistics.median([h for h, d in zip(hooks, due, strict=True) if not d])
    share = statistics.mean([h - usual for h, d in zip(hooks, due, strict=True) if d]) / period
    extra = [h - usual if d else 0.0 for h, d in zip(hooks, due, strict=True)]
    return [s - e + share for s, e in zip(seconds, extra, strict=True)], [
        h - e + share for h, e in zip(hooks, extra, strict=True)
    ]

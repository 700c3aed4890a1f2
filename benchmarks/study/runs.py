"""One run of the study: what defines it, and what comes out of it."""

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import DataCollatorWithPadding, PrinterCallback, set_seed
from transformers.trainer_utils import get_last_checkpoint

import hf_admm
from benchmarks.common import machine
from benchmarks.study.lines import key
from benchmarks.study.methods import METHODS, PHASE_2_FLAGS, Method
from benchmarks.study.tasks import further, judged, recipe
from benchmarks.study.training import build, learning_rates, phase_1_figures
from hf_admm import ADMMTrainingArguments
from hf_admm.arguments import ADMMArgumentsMixin
from hf_admm.audit import audit_checkpoint
from hf_admm.finetuning.evaluation import evaluate_saved
from hf_admm.finetuning.tasks import TextTask
from hf_admm.finetuning.text_classification import FineTuning
from hf_admm.pruning.defaults import CALIBRATION_SAMPLES
from hf_admm.training.distillation_arguments import OWN


# What a dense run takes from the flags of sparse training is its learning rates alone; they are compared step by step.
_NOMINAL_STEPS = 500
_FLAGS = sorted(item.name for item in fields(ADMMArgumentsMixin))
_TRAINING = (
    *("learning_rate", "per_device_train_batch_size", "num_train_epochs", "max_steps", "warmup_steps"),
    *("lr_scheduler_type", "optim", "weight_decay", "max_grad_norm", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("train_sampling_strategy", "bf16"),
)
_FURTHER = "further"
_PACKAGES = ("torch", "transformers", "accelerate", "datasets")


def recorded_flags(args: ADMMTrainingArguments, kind: str = "ours") -> dict:
    """
    The flags of sparse training that an outcome depends on, with what is taken for the length of the phases, of a
    method of that kind.
    """
    # A teacher's folder says nothing of the outcome, nor whether there is a report of it.
    unsaid = ("sparsity_report",) if args.distill_teacher in OWN else ("distill_teacher", "sparsity_report")
    taken = {
        "admm_steps": args.phase_1_length,
        "srste_mask": args.mask_mode,
        "num_calibration_samples": CALIBRATION_SAMPLES if kind == "sparsegpt" else args.calibration_samples,
    }
    if args.trains_dense and not args.learns_from_switch:
        taken["admm_rho"] = 0.0  # else it would pass for a run of these lengths with a penalty
    return {name: getattr(args, name) for name in _FLAGS if name not in unsaid} | taken


@dataclass(frozen=True)
class Spec:
    """
    What defines a run.

    Args:
        task (`str`), method (`str`), pattern (`str`), seed (`int`), rate (`float`):
            The place in the study. The rate is a multiple of the task's learning rate; a dense run has the pattern
            `"none"`.
        epochs (`float`, *optional*), max_steps (`int`, *optional*):
            Instead of the task's.
        tune (`bool`, *optional*):
            Whether it is judged on training rows that are held out.
        flags (`Mapping`, *optional*):
            Flags of `ADMMTrainingArguments` that all methods start from, instead of the defaults.
        bf16 (`bool`, *optional*):
            The precision of training.
        model (`str`, *optional*):
            What the model is called.
        rows (`tuple[int, int]`, *optional*):
            At most that many for training and evaluation.
        label (`str`, *optional*):
            Anything that tells apart runs of the same settings, such as an experiment with the code.
    """

    task: str
    method: str
    pattern: str
    seed: int
    rate: float = 1.0
    epochs: float | None = None
    max_steps: int = -1
    tune: bool = False
    flags: Mapping = field(default_factory=dict)
    bf16: bool = False
    model: str = "all-MiniLM-L6-v2"
    rows: tuple[int, int] | None = None
    label: str = ""

    @property
    def how(self) -> Method:
        """The method."""
        return METHODS[self.method]

    def arguments(self, output_dir: str = "unused") -> dict:
        """What `ADMMTrainingArguments` is made from, the pattern and a teacher left out."""
        task = recipe(self.task, self.epochs)
        return {
            "output_dir": output_dir,
            "learning_rate": task.learning_rate * self.rate,
            "per_device_train_batch_size": task.batch_size,
            "per_device_eval_batch_size": 64,
            "num_train_epochs": task.epochs,
            "max_steps": self.max_steps,
            "warmup_steps": task.warmup,
            "train_sampling_strategy": "group_by_length",
            "seed": self.seed,
            "bf16": self.bf16,
            "use_cpu": not torch.cuda.is_available(),
            "logging_steps": 10,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            **self.flags,
            **self.how.flags,
        }

    @cached_property
    def settings(self) -> dict:
        """All that the outcome depends on, except the code."""
        pattern = "2:4" if self.how.dense else self.pattern
        args = ADMMTrainingArguments(**self.arguments(), sparsity_pattern=pattern)
        named = {name: getattr(args, name) for name in _TRAINING}
        named["lr_scheduler_type"] = str(getattr(named["lr_scheduler_type"], "value", named["lr_scheduler_type"]))
        named["optim"] = str(getattr(named["optim"], "value", named["optim"]))
        if self.how.dense:
            named["learning_rates"] = key({"multipliers": learning_rates(args, _NOMINAL_STEPS)})
        elif self.how.kind != "pat":
            named |= recorded_flags(args, self.how.kind)
        return {
            "task": self.task,
            "method": self.method,
            "pattern": self.pattern,
            "seed": self.seed,
            "rate": self.rate,
            "judged_on": "held-out training rows" if self.tune else "dev",
            "model": self.model,
            "max_seq_length": recipe(self.task).max_seq_length,
            "rows": list(self.rows) if self.rows else None,
            "label": self.label,
            "arguments": named,
        }

    @cached_property
    def key(self) -> str:
        """What the run is known by."""
        return key(self.settings)

    @cached_property
    def phase_1_key(self) -> str | None:
        """
        What its state at the switch is known by, the same for methods that differ in phase 2 alone. Other code has
        other states: one may be kept for long.
        """
        arguments = self.settings["arguments"]
        if self.how.kind != "ours" or self.how.taught or not arguments.get("admm_steps"):
            return None
        before = {name: value for name, value in arguments.items() if name not in PHASE_2_FLAGS}
        return key(self.settings | {"method": None, "arguments": before, "source": source_digest()})


@dataclass(frozen=True)
class Place:
    """
    Where runs take place.

    Args:
        model_dir (`str`):
            The pre-trained model.
        work_dir (`Path`):
            For what a run writes, and for what several share.
        tasks (`Callable`):
            The raw data of a task, by its name.
        threads (`int`):
            Of torch.
    """

    model_dir: str
    work_dir: Path
    tasks: Callable[[str], TextTask]
    threads: int = 1

    def switch(self, spec: Spec) -> Path:
        """The folder of the state at the switch."""
        return self.work_dir / "switch" / str(spec.phase_1_key)

    def teacher(self, spec: Spec) -> Path:
        """The folder of the dense model that teaches a run."""
        return self.work_dir / "teachers" / dense_of(spec).key


def dense_of(spec: Spec) -> Spec:
    """The dense run of the same task and seed."""
    return replace(spec, method="dense", pattern="none", rate=1.0)


def execute(
    spec: Spec, place: Place, share: bool = False, keep: Path | None = None, before: Path | None = None
) -> dict:
    """
    Trains, saves, and evaluates what plain `from_pretrained` loads.

    Args:
        spec ([`Spec`]):
            The run.
        place ([`Place`]):
            Where.
        share (`bool`, *optional*, defaults to `False`):
            Whether others go on from this run's state at the switch, so that it is kept. If it is there already, this
            run goes on from it, to the same bits.
        keep (`Path`, *optional*):
            Where to keep the model.
        before (`Path`, *optional*):
            Where to keep it as it is right before the switch, not projected.

    Returns:
        `dict`: The line of the results.
    """
    start = time.perf_counter()
    torch.set_num_threads(place.threads)
    switch = place.switch(spec)  # before there is a trainer: making arguments resets what it has set up
    place.work_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.work_dir, prefix=f"{spec.method}-") as folder:
        made = _train(spec, place, folder, switch if share else None, before)
        if keep is not None:
            keep.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(keep, ignore_errors=True)
            shutil.move(made.model_dir, keep)
    return {
        "key": spec.key,
        **spec.settings,
        "metric": made.metric,
        "value": made.metrics[made.metric],
        "metrics": made.metrics,
        "further": made.further,
        "steps": made.steps,
        "rows_used": made.rows,
        "sparsity": made.sparsity,
        "broken_groups": made.broken,
        "phase_1": made.phase_1,
        "from_switch": made.from_switch,
        "seconds": round(time.perf_counter() - start, 1),
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "machine": machine(place.threads),
        "versions": {"hf_admm": hf_admm.__version__, **{name: version(name) for name in _PACKAGES}},
        "source": source_digest(),
    }


def _train(spec: Spec, place: Place, folder: str, switch: Path | None, before: Path | None) -> SimpleNamespace:
    whole = place.tasks(spec.task)
    task: TextTask = judged(whole, spec.tune)
    more = None if spec.tune else further(whole)
    all_rows = replace(task, evaluations=task.evaluations | ({} if more is None else {_FURTHER: more}))
    all_rows = all_rows.limited(*spec.rows) if spec.rows else all_rows
    arguments = spec.arguments(folder)
    if spec.how.taught:
        if not place.teacher(spec).is_dir():
            execute(dense_of(spec), place, keep=place.teacher(spec))
        arguments["distill_teacher"] = str(place.teacher(spec))
    tuning = FineTuning(all_rows, place.model_dir, arguments, recipe(spec.task).max_seq_length, spec.model)
    tokenized, tokenizer = tuning._tokenized()
    evaluations = dict(tokenized.evaluations)
    apart = replace(tokenized, evaluations={_FURTHER: evaluations.pop(_FURTHER)}) if more is not None else None
    tokenized = replace(tokenized, evaluations=evaluations)  # what is left judges in training too
    set_seed(spec.seed)
    collate = DataCollatorWithPadding(tokenizer)
    trainer = build(
        spec.how,
        "2:4" if spec.how.dense else spec.pattern,
        arguments,
        tuning._model(tokenizer),
        lambda rows: dict(collate([tokenized.train[row] for row in rows])),
        saves=switch is not None,
        before=before,
        train_dataset=tokenized.train,
        eval_dataset=evaluations if len(evaluations) > 1 else next(iter(evaluations.values())),
        processing_class=tokenizer,
        data_collator=collate,
        compute_metrics=tokenized.compute_metrics,
    )
    trainer.remove_callback(PrinterCallback)
    checkpoint = get_last_checkpoint(switch) if switch and switch.is_dir() else None
    trainer.train(resume_from_checkpoint=checkpoint)
    if switch and checkpoint is None and (written := get_last_checkpoint(folder)):
        switch.mkdir(parents=True, exist_ok=True)
        os.replace(written, switch / Path(written).name)
    model_dir = os.path.join(folder, "model")
    trainer.save_model(model_dir)
    metrics = evaluate_saved(model_dir, trainer.args, tokenized, tokenizer)
    beyond = apart and {
        "rows": len(apart.evaluations[_FURTHER]),
        **evaluate_saved(model_dir, trainer.args, apart, tokenizer),
    }
    audit = None if spec.how.dense else audit_checkpoint(model_dir, spec.pattern)
    admm_steps = trainer.args.phase_plan(trainer.state.max_steps).admm_steps if trainer.args.is_sparse else 0
    final = metrics[task.headline]
    phase_1 = phase_1_figures(trainer.state.log_history, admm_steps, task.headline, final)
    return SimpleNamespace(
        model_dir=model_dir,
        metric=task.headline,
        metrics=metrics,
        further=beyond,
        steps=trainer.state.global_step,
        rows={"train": len(tokenized.train)} | {name: len(rows) for name, rows in evaluations.items()},
        sparsity=audit.sparsity if audit else 0.0,
        broken=audit.violations if audit else 0,
        phase_1=phase_1,
        from_switch=checkpoint is not None,
    )


def source_digest() -> str:
    """Of the library's code: whether two lines were made by the same."""
    digest, root = hashlib.sha256(), Path(hf_admm.__file__).parent
    beside = [root.parent / "callbacks", root / "callbacks"]
    for path in sorted(path for folder in (root, *beside) for path in folder.rglob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:12]

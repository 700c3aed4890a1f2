"""The pictures of docs/guide.md, from short runs of all-MiniLM-L6-v2 on labelled tweets, each under a minute
long on an idle core.

`python -m benchmarks.guide_figures` runs what `results/guide_figures.json` does not hold yet and draws all pictures;
`--anew` runs everything again.
"""

import argparse
import json
import re
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    TrainerCallback,
    set_seed,
)
from transformers.utils import logging

from benchmarks.common import RESULTS, machine
from hf_admm import ADMMTrainer, ADMMTrainingArguments
from hf_admm.commands.quickstart import MODEL_PACKAGE, tweets_task
from hf_admm.finetuning.results import MODEL_FOLDER
from hf_admm.finetuning.tweets import packaged_file


ROOT = Path(__file__).parent.parent
PICTURES = ROOT / "docs" / "pictures"
STEPS = 120
SEQUENCE_LENGTH = 24
EVALUATIONS = 4
EVERY = 4  # steps between two points of the curves
# Of every run; the phase 1 that all are compared with is named in full, whatever the defaults are.
SETTING = {
    "max_steps": STEPS,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 100,
    "learning_rate": 3e-4,
    "warmup_steps": 0.06,
    "seed": 1,
    "sparsity_pattern": "2:4",
    "admm_steps": 0.6,
    "admm_penalty": "distance",
    "admm_rho": 16.0,
}
# A picture each: the name of a curve, and what its run has other than the above.
FIGURES = {
    "rho": {
        "rho 1, too small": {"admm_rho": 1.0},
        "rho 16": {},
        "rho 400, too large": {"admm_rho": 400.0},
    },
    "interval": {
        "distance": {},
        "loss, an update every 4 steps": {"admm_penalty": "loss", "admm_rho": 0.01, "admm_update_steps": 4},
    },
    "phases": {
        "no phase 1": {"admm_steps": 0.0},
        "0.6 of the run": {},
        "0.2 of the run": {"admm_steps": 0.2},
    },
    "patterns": {
        "2:4": {},
        "1:4": {"sparsity_pattern": "1:4"},
    },
}
# What is drawn, from top to bottom: a figure of the log, its label, its scale.
PANELS = (
    ("admm/primal_residual", "distance to the pattern\n(share of the norm)", "log"),
    ("admm/mask_flips", "mask that moved at\nthe last update (share)", "log"),
    ("eval_accuracy", "accuracy of the\nsparse weights", "linear"),
)
LOWEST = 1e-6  # a logarithm has no zero


class Residual(TrainerCallback):
    """Takes the distance to the pattern as it is now: the log has that of the last update."""

    def __init__(self, trainer: ADMMTrainer):
        self.trainer = trainer
        self.residuals: list[tuple[int, float]] = []

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % EVERY:
            return
        weights = self.trainer.sparsity.weights
        squares = torch.zeros(2)
        for name, weight in weights.local():
            outside = weight.detach() * ~weights.projection_mask(name)
            squares += torch.stack([outside.float().square().sum(), weight.detach().float().square().sum()])
        self.residuals.append((state.global_step, float((squares[0] / squares[1]).sqrt())))


def run(overrides: dict, max_steps: int = STEPS, model_dir: Path | None = None, eval_rows: int = 250) -> dict:
    """
    Trains once.

    Args:
        overrides (`dict`):
            What the run has other than `SETTING`.
        max_steps (`int`, *optional*, defaults to 120):
            Length of the run.
        model_dir (`Path`, *optional*):
            The pre-trained model. By default that of the quickstart's package.
        eval_rows (`int`, *optional*, defaults to 250):
            Tweets to evaluate on.

    Returns:
        `dict`: The arguments, and for each figure of `PANELS` the steps and the values.
    """
    arguments = {**SETTING, **overrides, "max_steps": max_steps}
    folder = model_dir or packaged_file(MODEL_PACKAGE, Path(MODEL_FOLDER))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    task = tweets_task().limited(arguments["per_device_train_batch_size"] * max_steps, eval_rows)
    task = task.mapped(
        lambda rows: rows.map(
            lambda batch: tokenizer(batch["sentence1"], truncation=True, max_length=SEQUENCE_LENGTH),
            batched=True,
            remove_columns=["sentence1"],
        )
    )
    set_seed(arguments["seed"])
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32, num_labels=len(task.labels), ignore_mismatched_sizes=True
    )
    with TemporaryDirectory() as output:
        args = ADMMTrainingArguments(
            output_dir=output,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            bf16=torch.cpu._is_avx512_bf16_supported(),
            save_strategy="no",
            logging_steps=EVERY,
            eval_strategy="steps",
            eval_steps=max(1, max_steps // EVALUATIONS),
            **arguments,
        )
        trainer = ADMMTrainer(
            model=model,
            args=args,
            train_dataset=task.train,
            eval_dataset=task.evaluations["validation"],
            processing_class=tokenizer,
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=task.compute_metrics,
        )
        trainer.add_callback(taken := Residual(trainer))
        trainer.train()
    curves = {"admm/primal_residual": dict(taken.residuals)}
    for figure in ("admm/mask_flips", "eval_accuracy"):
        curves[figure] = {entry["step"]: entry[figure] for entry in trainer.state.log_history if figure in entry}
    return {
        "arguments": arguments,
        "curves": {
            figure: {"steps": list(points), "values": [float(f"{value:.4g}") for value in points.values()]}
            for figure, points in curves.items()
        },
    }


def same_run(overrides: dict, records: dict[str, dict]) -> dict | None:
    """The record of a run with these arguments, if there is one: curves of several pictures may share it."""
    wanted = {**SETTING, **overrides}
    return next((record for record in records.values() if record["arguments"] == wanted), None)


def keep(records: dict[str, dict], path: Path, threads: int) -> None:
    """Writes the records, each curve on two lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"machine": machine(threads), "runs": records}, indent=1)
    path.write_text(re.sub(r"\[[^\[\]{}]*\]", lambda found: " ".join(found[0].split()), text) + "\n", encoding="utf-8")


def draw(figures: dict[str, dict], records: dict[str, dict], folder: Path) -> list[Path]:
    """
    Draws the pictures.

    Args:
        figures (`dict[str, dict]`):
            For each picture its curves, as in `FIGURES`.
        records (`dict[str, dict]`):
            What [`run`] returned, by a name of any kind.
        folder (`Path`):
            Where to put the files.

    Returns:
        `list[Path]`: The files.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, curves in figures.items():
        figure = Figure(figsize=(7, 7), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(len(PANELS), sharex=True)
        for axes, (quantity, label, scale) in zip(panels, PANELS, strict=True):
            for number, (title, overrides) in enumerate(curves.items()):
                record = same_run(overrides, records)
                curve = record["curves"][quantity]
                values = [max(value, LOWEST) if scale == "log" else value for value in curve["values"]]
                axes.plot(curve["steps"], values, label=title, color=f"C{number}", marker="." * (scale == "linear"))
                switch = record["arguments"]["admm_steps"] * record["arguments"]["max_steps"]
                axes.axvline(switch, color=f"C{number}", linewidth=0.8, linestyle=":")
            axes.set_yscale(scale)
            axes.set_ylabel(label)
        panels[0].legend(fontsize="small")
        panels[-1].set_xlabel("step; dotted: the switch from phase 1 to phase 2")
        drawn.append(folder / f"guide_{name}.png")
        figure.savefig(drawn[-1], dpi=100, metadata={"Software": None})
    return drawn


def main() -> None:
    options = argparse.ArgumentParser(prog="python -m benchmarks.guide_figures", description=__doc__)
    options.add_argument("--anew", action="store_true", help="run what there is a record of, too")
    options.add_argument("--threads", type=int, default=1, help="threads of torch")
    options.add_argument("--output", type=Path, default=RESULTS / "guide_figures.json")
    options.add_argument("--pictures", type=Path, default=PICTURES)
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    known = {} if args.anew or not args.output.is_file() else json.loads(args.output.read_text())["runs"]
    for name, curves in FIGURES.items():
        for title, overrides in curves.items():
            if same_run(overrides, known) is None:
                print(f"{name}, {title}", flush=True)
                known[f"{name}: {title}"] = run(overrides)
                keep(known, args.output, args.threads)
    for path in draw(FIGURES, known, args.pictures):
        print(f"wrote {path}")


if __name__ == "__main__":
    main()

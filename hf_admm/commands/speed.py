"""`hf-admm speed`: what 2:4 weights bring a checkpoint on this GPU, dense against sparse, for each batch size."""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from hf_admm.commands.loading import load_model
from hf_admm.inference import BACKENDS, DTYPES, accelerate_inference


# A measurement below this is mostly the clock: shorter calls are timed several at once.
MIN_SECONDS = 0.01

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
_DESCRIPTION = """\
Loads a checkpoint, copies it, turns the 2:4 linear layers of the copy into PyTorch's semi-structured sparse tensors,
and times the forward passes of both in turns on random tokens. Needs a CUDA GPU of compute capability 8.0 or newer.
"""
_EXIT_CODES = "exit code: 0 measured (whatever came out), 2 bad input, no such GPU, or no layer that can be sparse"


def main(argv: Sequence[str] | None = None) -> int:
    """
    Runs `hf-admm speed PATH_OR_ID [--batch_sizes 1 8 32] [--sequence_length 128] [--dtype bfloat16] [--compile]`.

    Args:
        argv (`Sequence[str]`, *optional*):
            The arguments after the command's name. Defaults to those of the process.

    Returns:
        `int`: 0.

    Raises:
        `ValueError`: If a number is out of range, there is no GPU, the checkpoint cannot be found or is of a model
            that takes no tokens, or none of its layers can be sparse.
    """
    args = _parser().parse_args(argv)
    _check_numbers(args)
    if not torch.cuda.is_available():
        raise ValueError(
            "hf-admm speed needs a CUDA GPU of compute capability 8.0 (Ampere) or newer, and "
            "torch.cuda.is_available() is False: PyTorch has no kernels for 2:4 on a CPU. Run it on a machine with "
            "such a GPU and a CUDA build of PyTorch; accelerate_inference(model, dry_run=True).table() lists, on any "
            "machine, what would be sparse."
        )
    model = load_model(args.path_or_id, _DTYPES[args.dtype], args.sequence_length).to("cuda")
    results = measure(model, args)
    print(json.dumps(results, indent=2) if args.json else table(results))
    return 0


def measure(model: PreTrainedModel, args: argparse.Namespace) -> dict[str, Any]:
    """
    Times a model against its accelerated copy.

    Args:
        model (`PreTrainedModel`):
            The dense model, where it is to be timed. It is left as it is.
        args (`argparse.Namespace`):
            The flags of the command.

    Returns:
        `dict[str, Any]`: The setting, and under `"rows"` for each batch size the medians in milliseconds, their ratio,
        the largest difference between the outputs, and the largest output.
    """
    sparse = copy.deepcopy(model)
    report = accelerate_inference(sparse, args.backend)
    device = model.device
    rows = []
    for batch_size in args.batch_sizes:
        torch.compiler.reset()  # else the number of shapes that one function is compiled for runs out
        inputs = random_inputs(model.config, batch_size, args.sequence_length, device)
        pair = [torch.compile(each, dynamic=False) if args.compile else each for each in (model, sparse)]
        with torch.inference_mode():
            expected, outputs = (each(**inputs)[0].float() for each in pair)
            difference = float((outputs - expected).abs().max())
            largest = float(expected.abs().max())
            del expected, outputs
            calls = [partial(each, **inputs) for each in pair]
            dense_ms, sparse_ms = median_milliseconds(calls, args.repeats, device)
        rows.append(
            {
                "batch_size": batch_size,
                "dense_ms": dense_ms,
                "sparse_ms": sparse_ms,
                "ratio": dense_ms / sparse_ms,
                "max_abs_difference": difference,
                "max_abs_output": largest,
            }
        )
    return {
        "model": type(model).__name__,
        "path": args.path_or_id,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "torch": torch.__version__,
        "dtype": args.dtype,
        "sequence_length": args.sequence_length,
        "compile": args.compile,
        "repeats": args.repeats,
        "layers": report.summary(),
        "rows": rows,
    }


def median_milliseconds(calls: Sequence[Callable[[], Any]], repeats: int, device: torch.device) -> list[float]:
    """
    Times functions in turns, so that a GPU that slows down as it warms slows them all.

    Args:
        calls (`Sequence[Callable]`):
            The functions, each of which is called once before.
        repeats (`int`):
            Measurements of each function.
        device (`torch.device`):
            Where they compute: its queue is emptied before the clock is read.

    Returns:
        `list[float]`: The median time of one call of each function, in milliseconds.
    """

    def seconds(call: Callable[[], Any], times: int) -> float:
        _wait(device)
        start = time.perf_counter()
        for _ in range(times):
            call()
        _wait(device)
        return time.perf_counter() - start

    for call in calls:
        call()
    times = [max(1, round(MIN_SECONDS / max(seconds(call, 1), 1e-6))) for call in calls]
    measured = [[seconds(*each) / each[1] for each in zip(calls, times, strict=True)] for _ in range(repeats)]
    return [1000 * statistics.median(column) for column in zip(*measured, strict=True)]


def random_inputs(
    config: PretrainedConfig, batch_size: int, sequence_length: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """
    Ordinary tokens drawn with a fixed seed, the last one the end of the text where the model knows one.

    Args:
        config (`PretrainedConfig`):
            Config of the model.
        batch_size (`int`):
            Texts in the batch.
        sequence_length (`int`):
            Tokens of each text.
        device (`torch.device`):
            Where the inputs are to lie.

    Returns:
        `dict[str, torch.Tensor]`: `input_ids` and `attention_mask` of shape `(batch_size, sequence_length)`, and
        `decoder_input_ids` for a model with an encoder and a decoder.
    """
    text = config.get_text_config()
    named = (getattr(text, f"{name}_token_id", None) for name in ("pad", "bos", "eos", "sep", "cls"))
    special = {token for tokens in named for token in (tokens if isinstance(tokens, list) else [tokens])}
    ordinary = torch.tensor([token for token in range(text.vocab_size) if token not in special] or [0])
    generator = torch.Generator().manual_seed(0)
    ids = ordinary[torch.randint(len(ordinary), (batch_size, sequence_length), generator=generator)]
    end = getattr(text, "eos_token_id", None)
    if isinstance(end, int) and 0 <= end < text.vocab_size:
        ids[:, -1] = end
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def table(results: dict[str, Any]) -> str:
    """
    The results of [`measure`] as plain text.

    Args:
        results (`dict[str, Any]`):
            What [`measure`] returned.

    Returns:
        `str`: The table, with the setting above it.
    """
    head = ("batch size", "dense ms", "sparse ms", "dense / sparse", "max difference", "max output")
    cells = [head]
    for row in results["rows"]:
        size, dense, sparse, ratio, difference, largest = row.values()
        numbers = (f"{dense:.3f}", f"{sparse:.3f}", f"{ratio:.2f}", f"{difference:.2g}", f"{largest:.2g}")
        cells.append((str(size), *numbers))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
    mode = "compiled" if results["compile"] else "eager"
    setting = (
        f"{results['model']}, {results['dtype']}, {results['sequence_length']} tokens, {mode}, median of "
        f"{results['repeats']}, torch {results['torch']} on {results['device']}"
    )
    return "\n".join([setting, results["layers"], *lines])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("hf-admm speed", description=_DESCRIPTION, epilog=_EXIT_CODES)
    parser.add_argument("path_or_id", help="folder of a checkpoint, or the id of a model on the hub")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8, 32], metavar="N", help="default: 1 8 32")
    parser.add_argument("--sequence_length", type=int, default=128, metavar="N", help="tokens a text (default: 128)")
    parser.add_argument(
        "--dtype", choices=_DTYPES, default="bfloat16", help="dtype of the weights (default: bfloat16)"
    )
    parser.add_argument("--compile", action="store_true", help="compile both models with torch.compile")
    parser.add_argument(
        "--backend", choices=BACKENDS, help="kernels of the sparse layers (default: the first that fits)"
    )
    parser.add_argument("--repeats", type=int, default=20, metavar="N", help="measurements of each (default: 20)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    return parser


def _check_numbers(args: argparse.Namespace) -> None:
    given = [("--batch_sizes", size) for size in args.batch_sizes]
    given += [("--sequence_length", args.sequence_length), ("--repeats", args.repeats)]
    if low := [f"{flag} {number}" for flag, number in given if number < 1]:
        raise ValueError(f"{', '.join(low)} is not allowed: give whole numbers of at least 1.")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

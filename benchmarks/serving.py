"""Where 2:4 pays in serving, and how near the projection comes to the bandwidth of the memory. Needs a CUDA GPU.

Times the linear layers and MLPs of BERT-base and Llama-1B, dense against PyTorch's semi-structured sparse tensors, for
several batch sizes in tokens, eager and compiled:

    python -m benchmarks.serving --json serving.json

Every time is a median of several measurements, in turns between dense and sparse. A layer is called again and again on
the same input, so weights smaller than the cache of the GPU stay in it, dense and sparse alike; `hf-admm speed` times
whole models.

exit code: 0 measured, 2 without a GPU of compute capability 8.0 or newer
"""

import argparse
import copy
import itertools
import json
import sys
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from hf_admm import accelerate_inference, parse_pattern, project
from hf_admm.commands.speed import median_milliseconds
from hf_admm.inference import BACKENDS, DTYPES


PATTERN = parse_pattern("2:4")
DTYPE_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
TOKENS = [1, 16, 128, 512, 2048, 8192, 32768]
PROJECTED = [(768, 3072), (2048, 8192), (8192, 8192)]


class Mlp(nn.Module):
    """BERT's two layers, or Llama's three with a gate."""

    def __init__(self, width: int, inner: int, gated: bool):
        super().__init__()
        self.gate = nn.Linear(width, inner, bias=False) if gated else None
        self.up = nn.Linear(width, inner, bias=not gated)
        self.down = nn.Linear(inner, width, bias=not gated)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.gate is None:
            return self.down(functional.gelu(self.up(inputs)))
        return self.down(functional.silu(self.gate(inputs)) * self.up(inputs))


# Each makes a layer and says how many features go into it.
SHAPES = {
    "bert": {
        "768 -> 768": (partial(nn.Linear, 768, 768), 768),
        "768 -> 3072": (partial(nn.Linear, 768, 3072), 768),
        "3072 -> 768": (partial(nn.Linear, 3072, 768), 3072),
        "MLP 768, 3072": (partial(Mlp, 768, 3072, gated=False), 768),
    },
    "llama": {
        "2048 -> 512": (partial(nn.Linear, 2048, 512, bias=False), 2048),
        "2048 -> 2048": (partial(nn.Linear, 2048, 2048, bias=False), 2048),
        "2048 -> 8192": (partial(nn.Linear, 2048, 8192, bias=False), 2048),
        "8192 -> 2048": (partial(nn.Linear, 8192, 2048, bias=False), 8192),
        "MLP 2048, 8192": (partial(Mlp, 2048, 8192, gated=True), 2048),
    },
}


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
        found = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA GPU"
        print(
            f"This benchmark needs a CUDA GPU of compute capability 8.0 (Ampere) or newer, and found {found}. Nothing "
            "was measured. Run the same command on a machine with such a GPU.",
            file=sys.stderr,
        )
        return 2
    device = torch.device("cuda")
    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, median of {args.repeats}")
    results = {
        "device": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "repeats": args.repeats,
        "serving": serving(args, device),
        "projection": projection(args, device),
    }
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return 0


def serving(args: argparse.Namespace, device: torch.device) -> list[dict]:
    """Prints and returns a row for each model, layer, dtype, backend, mode and batch size."""
    rows = []
    print("\nmodel  layer           dtype     backend     mode     tokens  dense ms  sparse ms  dense / sparse")
    settings = itertools.product(args.models, args.dtypes, args.backends, args.modes)
    for model, dtype, backend, mode in settings:
        for name, (make, width) in SHAPES[model].items():
            dense = sparse_weights(make().to(device, DTYPE_NAMES[dtype]).eval())
            sparse = copy.deepcopy(dense)
            row = {"model": model, "layer": name, "dtype": dtype, "backend": backend, "mode": mode}
            try:
                accelerate_inference(sparse, backend)
            except ValueError as error:
                rows.append({**row, "refused": str(error)})
                print(f"{model:5}  {name:14}  {dtype:8}  {backend:10}  {mode:7}  refused: {error}")
                continue
            for tokens in args.tokens:
                torch.compiler.reset()  # else the number of shapes that one function is compiled for runs out
                pair = [torch.compile(each, dynamic=False) if mode == "compile" else each for each in (dense, sparse)]
                inputs = torch.randn(tokens, width, device=device, dtype=DTYPE_NAMES[dtype])
                with torch.inference_mode():
                    calls = [partial(each, inputs) for each in pair]
                    times = median_milliseconds(calls, args.repeats, device)
                rows.append({**row, "tokens": tokens, "dense_ms": times[0], "sparse_ms": times[1]})
                print(
                    f"{model:5}  {name:14}  {dtype:8}  {backend:10}  {mode:7}  {tokens:6}  {times[0]:8.4f}  "
                    f"{times[1]:9.4f}  {times[0] / times[1]:14.2f}"
                )
    return rows


def projection(args: argparse.Namespace, device: torch.device) -> list[dict]:
    """Prints and returns the throughput of the projection, by the bytes it must read and write, beside a copy's."""
    rows = []
    print("\nshape      dtype     project ms  GB/s  copy ms  GB/s  share of the copy's bandwidth")
    for (outputs, inputs), dtype in itertools.product(PROJECTED, [*args.dtypes, "float32"]):
        weight = torch.randn(outputs, inputs, device=device, dtype=getattr(torch, dtype))
        calls = [partial(project, weight, PATTERN), weight.clone]
        project_ms, copy_ms = median_milliseconds(calls, args.repeats, device)
        moved = 2 * weight.numel() * weight.element_size() / 1e6
        rows.append({"shape": [outputs, inputs], "dtype": dtype, "project_ms": project_ms, "copy_ms": copy_ms})
        print(
            f"{f'{outputs}x{inputs}':9}  {dtype:8}  {project_ms:10.4f}  {moved / project_ms:4.0f}  {copy_ms:7.4f}  "
            f"{moved / copy_ms:4.0f}  {copy_ms / project_ms:.2f}"
        )
    return rows


def sparse_weights(model: nn.Module) -> nn.Module:
    """The model with all of its matrices 2:4."""
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data = project(parameter.data, PATTERN)
    return model


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    made.add_argument("--tokens", nargs="+", type=int, default=TOKENS, metavar="N", help="batch sizes in tokens")
    made.add_argument("--dtypes", nargs="+", choices=DTYPE_NAMES, default=list(DTYPE_NAMES))
    made.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    made.add_argument("--modes", nargs="+", choices=["eager", "compile"], default=["eager", "compile"])
    made.add_argument("--repeats", type=int, default=11, metavar="N", help="measurements of each (default: 11)")
    made.add_argument("--json", metavar="FILE", help="write the results there too")
    return made


if __name__ == "__main__":
    sys.exit(main())

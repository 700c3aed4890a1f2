"""
Bytes and time of `hf-admm pack` and `unpack`: all-MiniLM-L6-v2 with its transformer's weights projected on 2:4.

The ratio counts every byte that stands for the packed weights, headers included. Times are beside those of copying the
plain folder.
"""

import shutil
import tempfile
from pathlib import Path

import torch
from transformers.utils import logging

from benchmarks.common import now, parser, ratios, row, show, write_result
from benchmarks.trainers import minilm, pruned_names
from hf_admm import parse_pattern, project
from hf_admm.packing.checkpoints import pack_checkpoint, unpack_checkpoint


PATTERNS = ("2:4", "4x4:8", "0.5")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
AT_MOST = {("2:4", "bf16"): 0.5625, ("2:4", "fp32"): 0.532}


def measure(model, pattern: str, dtype: str, folder: Path, repeats: int) -> dict:
    """One row: a pattern and a dtype."""
    model, plain = model.to(DTYPES[dtype]), folder / f"{pattern}-{dtype}".replace(":", "_")
    with torch.no_grad():
        for name in pruned_names(model):
            weight = model.get_parameter(name)
            weight.copy_(project(weight, parse_pattern(pattern)))
    model.save_pretrained(plain)
    seconds = {"copy": [], "pack": [], "unpack": []}
    for index in range(repeats):
        copied, packed, unpacked = (plain.with_name(f"{plain.name}-{kind}{index}") for kind in seconds)
        start = now()
        shutil.copytree(plain, copied)
        seconds["copy"].append(now() - start)
        start = now()
        report = pack_checkpoint(plain, packed, pattern)
        seconds["pack"].append(now() - start)
        start = now()
        unpack_checkpoint(packed, unpacked)
        seconds["unpack"].append(now() - start)
        same = (plain / "model.safetensors").read_bytes() == (unpacked / "model.safetensors").read_bytes()
        if not same:
            raise RuntimeError(f"{unpacked} differs from {plain}")
    megabytes = report.files[0][1] / 1e6
    times = {kind: ratios(seconds[kind], [megabytes / 100] * repeats) for kind in seconds}
    note = ", ".join(f"{kind} {sorted(values)[repeats // 2]:.2f} s" for kind, values in times.items())
    return row(
        f"packed weights, {pattern}, {dtype}",
        [report.ratio],
        at_most=AT_MOST.get((pattern, dtype)),
        note=f"per 100 MB of file: {note}; restored byte for byte",
        seconds_per_100_mb=times,
        file_bytes=report.files[0][1:],
    )


def main(argv=None) -> None:
    options = parser("Measures hf-admm pack and unpack.")
    options.add_argument("--repeats", type=int, default=3)
    args = options.parse_args(argv)
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    rows, label = [], ""
    with tempfile.TemporaryDirectory() as folder:
        for dtype in DTYPES:
            for pattern in PATTERNS:
                model, label = minilm()
                rows.append(measure(model, pattern, dtype, Path(folder), args.repeats))
                show(rows[-1:])
    write_result("files", args.output_dir, args.threads, rows, {}, model=label)


if __name__ == "__main__":
    main()

"""
Time of a projection mask beside those of others: one weight, each pattern, dtype and number of threads.

Reports how many times the time of [`hf_admm.sparsity_mask`] the fastest of the others takes, and that of a copy into a
warm buffer, below which no mask can be.
"""

import torch

from benchmarks import peers
from benchmarks.common import interleave, parser, ratios, row, show, summary, write_result
from hf_admm import parse_pattern, sparsity_mask


PATTERNS = ("2:4", "1:4", "4:8", "4x4:8", "0.5")
AT_LEAST = {"2:4": 8.0}  # and 3 for the others
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def measure(pattern: str, dtype: str, threads: int, size: int, rounds: int, device: str = "cpu"):
    """
    One row: a pattern, a dtype, a number of threads.

    Returns:
        `dict`, `dict[str, str]`: The row, and the rivals that were left out with the reason.
    """
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(size, size, generator=generator).to(device, DTYPES[dtype])
    parsed, buffer = parse_pattern(pattern), torch.empty_like(weight)
    ours = sparsity_mask(weight, parsed)
    rivals, left_out = peers.masks(weight, pattern)
    agreement = {}
    for name in list(rivals):
        try:
            theirs = rivals[name]() != 0
        except (RuntimeError, NotImplementedError) as error:
            left_out[name] = f"{type(error).__name__}: {error}"
            del rivals[name]
        else:
            agreement[name] = (theirs == ours).double().mean().item()  # less than 1 where there are ties
    contenders = {"ours": lambda: sparsity_mask(weight, parsed), "copy": lambda: buffer.copy_(weight)}
    seconds = interleave(contenders | rivals, rounds)
    others = {name: summary(ratios(seconds[name], seconds["ours"])) for name in rivals}
    fastest = min(others, key=lambda name: others[name]["median"])
    figure = f"projection {pattern}, {dtype}, {threads} thread{'s' if threads > 1 else ''}"
    entry = row(
        figure,
        ratios(seconds[fastest], seconds["ours"]),
        at_least=AT_LEAST.get(pattern, 3.0),
        fastest=fastest,
        beside={name: other["median"] for name, other in others.items()},
        milliseconds={name: summary([1e3 * s for s in times]) for name, times in seconds.items()},
        times_a_copy=summary(ratios(seconds["ours"], seconds["copy"])),
        agreement=agreement,
    )
    entry["note"] = f"{entry['times_a_copy']['median']:.3g} times a copy; of the others, {fastest} is fastest"
    return entry, left_out


def main(argv=None) -> None:
    options = parser("Times projection masks beside those of others.", threads=None)
    options.add_argument("--size", type=int, default=4096, help="side of the square weight")
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--patterns", nargs="+", default=PATTERNS)
    options.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    options.add_argument("--all_threads", type=int, nargs="+", default=[1, 2], help="numbers of threads to measure")
    options.add_argument("--device", default="cpu")
    args = options.parse_args(argv)
    rows, skipped = [], {}
    for threads in [args.threads] if args.threads else args.all_threads:
        for dtype in args.dtypes:
            for pattern in args.patterns:
                entry, left_out = measure(pattern, dtype, threads, args.size, args.rounds, args.device)
                show([entry])
                rows.append(entry)
                skipped |= {f"{name}, {pattern}, {dtype}": reason for name, reason in left_out.items()}
    about = {"weight": f"{args.size} x {args.size}", "rounds": args.rounds, "device": args.device}
    write_result("projection", args.output_dir, max(args.all_threads), rows, skipped, **about)


if __name__ == "__main__":
    main()

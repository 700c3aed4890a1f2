"""The plots of a study, where matplotlib is installed."""

from pathlib import Path

from benchmarks.study.figures import DENSE, Study
from benchmarks.study.methods import METHODS


def draw(study: Study, folder: Path) -> list[Path]:
    """
    Draws the share of dense of each method, a plot a pattern, with its interval.

    Args:
        study ([`Study`]):
            What to draw.
        folder (`Path`):
            Where to put the files.

    Returns:
        `list[Path]`: The files, none without matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        print("matplotlib is not installed (extra bench): no plots")
        return []
    drawn = []
    for pattern in study.patterns:
        names = [name for name in METHODS if name not in DENSE]
        shares = {METHODS[name].title: study.share(name, pattern) for name in names}
        shares = {title: share for title, share in shares.items() if share}
        if not shares:
            continue
        figure = Figure(figsize=(7, 0.6 + 0.4 * len(shares)), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        for place, share in enumerate(shares.values()):
            known = share.low is not None
            spread = [[100 * (share.mean - share.low)], [100 * (share.high - share.mean)]] if known else None
            axes.errorbar(100 * share.mean, place, xerr=spread, fmt="o", capsize=3, color="C0" if known else "0.6")
        axes.axvline(100, color="0.5", linewidth=1)
        axes.set_yticks(range(len(shares)), list(shares))
        axes.invert_yaxis()
        axes.set_xlabel(f"share of dense at {pattern}, %, with 95 % interval")
        folder.mkdir(parents=True, exist_ok=True)
        drawn.append(folder / f"share_of_dense_{pattern.replace(':', '_').replace('/', '_')}.png")
        figure.savefig(drawn[-1], dpi=120, metadata={"Software": None})
    return drawn

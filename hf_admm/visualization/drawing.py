"""How figures look: two themes, no colour that means something by itself, one width that a phone shows whole."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import cycle


WIDTH = 4.2  # inches; a phone shows it at three quarters of its size
_DPI = 200
_STYLES = (("-", "o"), ("--", "s"), ("-.", "^"), (":", "D"))
MAGNITUDES = "cividis"  # even to those who see no red or green, and in greyscale


@dataclass(frozen=True)
class Theme:
    """Colours of a figure: of its text, of what is secondary, of its ground, and of what it shows."""

    ink: str
    muted: str
    ground: str
    colors: tuple[str, ...]


# Okabe and Ito's, which stand apart without red or green; lines differ in their dashes and markers too.
LIGHT = Theme("#1b1f24", "#6b7380", "#ffffff", ("#0072B2", "#D55E00", "#009E73", "#AA4499"))
DARK = Theme("#e8eaed", "#9aa3af", "#1b1f24", ("#56B4E9", "#E69F00", "#2FC79A", "#E39AC4"))


def is_installed() -> bool:
    """Whether figures can be drawn."""
    return find_spec("matplotlib") is not None


def check_installed() -> None:
    """
    Raises:
        `ValueError`: If matplotlib is not installed.
    """
    if not is_installed():
        raise ValueError(
            "A report is drawn by matplotlib, which is not installed: pip install hf-admm[report]. To train without a "
            "report, set sparsity_report=False (--sparsity_report false)."
        )


def new_figure(height: float, rows: int = 1, **kwargs):
    """
    A figure of the width that all have, and its axes, one above the other.

    Args:
        height (`float`):
            In inches.
        rows (`int`, *optional*, defaults to 1):
            How many axes.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)  # without pyplot, which keeps figures and picks a window system
    return figure, figure.subplots(rows, 1, **kwargs)


def line_styles(theme: Theme):
    """Colour, dashes and marker for each line of a plot in turn."""
    pairs = cycle(zip(theme.colors, _STYLES, strict=True))
    return ({"color": color, "linestyle": dashes, "marker": marker} for color, (dashes, marker) in pairs)


def render(draw: Callable, theme: Theme) -> bytes:
    """
    Draws a figure.

    Args:
        draw (`Callable`):
            Takes the theme and returns the figure.
        theme ([`Theme`]):
            The theme.

    Returns:
        `bytes`: A PNG, the same for the same figure.
    """
    import matplotlib

    settings = {
        "font.family": "DejaVu Sans",
        "font.size": 9,
        "text.color": theme.ink,
        "axes.edgecolor": theme.muted,
        "axes.labelcolor": theme.ink,
        "axes.facecolor": theme.ground,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": False,
        "axes.titlesize": 9,
        "axes.titlelocation": "left",
        "figure.facecolor": theme.ground,
        "grid.color": theme.muted,
        "grid.alpha": 0.3,
        "legend.frameon": False,
        "legend.fontsize": 8,
        "lines.linewidth": 1.6,
        "lines.markersize": 3.5,
        "xtick.color": theme.ink,
        "ytick.color": theme.ink,
        "hatch.color": theme.muted,
    }
    # A user's own matplotlibrc is not asked, so that what was looked at is what everybody sees.
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, "backend": matplotlib.rcParams["backend"], **settings}):
        figure, picture = draw(theme), io.BytesIO()
        figure.savefig(picture, format="png", dpi=_DPI, metadata={"Software": None})
    return picture.getvalue()

"""The figures of what a run logged: curves over its steps."""

import math

from hf_admm.visualization.drawing import line_styles, new_figure
from hf_admm.visualization.logs import RunLogs


_MOST_METRICS = 4


def residual_curve(logs: RunLogs, theme):
    """How far the weights are from the pattern, on a logarithmic scale."""
    figure, axes = _curves(
        logs, theme, {"admm/primal_residual": "primal residual", "admm/dual_residual": "dual residual"}
    )
    cut = logs.series("admm/switch_residual")[1]
    if cut and logs.switch_step is not None and cut[0] > 0:
        axes.plot(logs.switch_step, cut[0], marker="X", markersize=8, linestyle="none", color=theme.ink, zorder=4)
        axes.plot([], [], marker="X", linestyle="none", color=theme.ink, label="cut off at the switch")
    axes.set_ylabel("share of the norm")
    _logarithmic(axes, logs.series("admm/primal_residual")[1] + logs.series("admm/dual_residual")[1] + cut)
    return _finish(figure, axes)


def flips_curve(logs: RunLogs, theme):
    """How much of the mask changed at each update."""
    figure, axes = _curves(logs, theme, {"admm/mask_flips": "mask flips"}, scale=100)
    axes.set_ylabel("% of the entries")
    _logarithmic(axes, [100 * value for value in logs.series("admm/mask_flips")[1]])
    return _finish(figure, axes)


def rate_curve(logs: RunLogs, theme):
    """The learning rate."""
    figure, axes = _curves(logs, theme, {"learning_rate": "learning rate"})
    axes.set_ylabel("learning rate")
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
    axes.set_ylim(bottom=0)
    return _finish(figure, axes)


def loss_curve(logs: RunLogs, theme):
    """The loss of the task in training."""
    figure, axes = _curves(logs, theme, {"loss": "training loss"})
    axes.set_ylabel("loss")
    return _finish(figure, axes)


def metric_curves(logs: RunLogs, theme):
    """What evaluations measured, of the sparse weights: a plot each."""
    names = logs.metrics[:_MOST_METRICS]
    figure, found = new_figure(0.7 + 1.6 * len(names), len(names), sharex=True, squeeze=False)
    for axes, name, style in zip(found[:, 0], names, line_styles(theme), strict=False):
        axes.plot(*logs.series(name), **style)
        axes.set_ylabel(name.removeprefix("eval_"))
        _frame(axes, logs, theme, label=axes is found[0, 0])
    found[-1, 0].set_xlabel("step")
    return figure


def _curves(logs: RunLogs, theme, names: dict[str, str], scale: float = 1):
    figure, axes = new_figure(2.9)
    for (name, label), style in zip(names.items(), line_styles(theme), strict=False):
        steps, values = logs.series(name)
        if steps:
            axes.plot(steps, [scale * value for value in values], label=label, **style)
    axes.set_xlabel("step")
    _frame(axes, logs, theme)
    return figure, axes


def _frame(axes, logs: RunLogs, theme, label: bool = True) -> None:
    """The grid, the whole run in sight, and where phase 2 begins."""
    from matplotlib.ticker import MaxNLocator

    axes.grid(True)
    axes.set_axisbelow(True)
    axes.set_xlim(0, 1.015 * max(logs.last_step, 1))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.margins(y=0.12)
    if logs.switch_step is None:
        return
    axes.axvline(logs.switch_step, color=theme.ink, linewidth=1, linestyle=(0, (2, 2)))
    if label:
        share = logs.switch_step / max(logs.last_step, 1)
        side = "left" if share < 0.2 else "right" if share > 0.8 else "center"
        place = {"transform": axes.get_xaxis_transform(), "ha": side, "va": "bottom", "fontsize": 8}
        axes.text(logs.switch_step, 1.02, "phase 2 begins", color=theme.ink, **place)


def _logarithmic(axes, values: list[float]) -> None:
    """Decades where the values span some, with a place for 0 if there is one."""
    positive = [value for value in values if value > 0]
    if not positive or max(positive) < 10 * min(positive):
        axes.set_ylim(bottom=0)
    elif len(positive) == len(values):
        axes.set_yscale("log")
    else:
        axes.set_yscale("symlog", linthresh=10 ** math.floor(math.log10(min(positive))), linscale=0.4)
        axes.set_ylim(bottom=0)


def _finish(figure, axes):
    if len(axes.get_legend_handles_labels()[0]) > 1:
        figure.legend(loc="outside lower center", ncols=2)
    return figure

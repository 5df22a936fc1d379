"""loss.png: the loss curve of a run as a PNG by matplotlib, for a README or a mail."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from gpt4moe.pages.curves import curve_of, smooth, smoothing_span, thin
from gpt4moe.runlog.metrics_columns import MetricColumns
from gpt4moe.runlog.run_files import replace_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, SOFT, GRID = "#1f2933", "#6b7785", "#e4e8ee"
BLUE, ORANGE = "#2563eb", "#ea580c"
LEVELS = ("#7c3aed", "#0f766e", "#b45309")
WIDTH, HEIGHT, DPI = 9, 5, 140
"""Inches, pixels an inch. The lowest and the highest point of each column of pixels are drawn."""
AXES = (0.09, 0.11, 0.89, 0.79)
"""Left, bottom, width, height of the axes, as shares of the picture."""
X_LABELS = {"consumed_tokens": "tokens", "step": "step"}
PLOT_STYLE = {
    "font.size": 11, "axes.edgecolor": SOFT, "axes.labelcolor": INK, "text.color": INK, "xtick.color": SOFT,
    "ytick.color": SOFT, "axes.spines.top": False, "axes.spines.right": False,
}  # fmt: skip


def plot_loss(
    path: Path | str,
    columns: MetricColumns,
    *,
    title: str,
    levels: Mapping[str, float] | None = None,
    x: str = "consumed_tokens",
) -> None:
    """Draw the training loss, raw and smoothed, and the held-out loss, as a PNG at `path`.

    Args:
        levels: name -> nats/token, each a labelled horizontal line, e.g. {"unigram entropy": 5.9}.
        x: consumed_tokens or step.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    with matplotlib.rc_context(PLOT_STYLE):
        # Figure without pyplot: no global state, and no display needed, whatever backend is configured.
        figure = Figure(figsize=(WIDTH, HEIGHT))
        # Margins that fit: a layout engine would draw every text once more to find them.
        axes = figure.add_axes(AXES)
        train = curve_of(columns, "loss", x=x)
        held_out = curve_of(columns, "eval_loss", x=x)
        if len(train):
            drawn = thin(train, 2 * WIDTH * DPI)
            axes.plot(drawn.x, drawn.y, color=BLUE, linewidth=0.8, alpha=0.3)
            smoothed = thin(smooth(train, smoothing_span(len(train))), 2 * WIDTH * DPI)
            axes.plot(smoothed.x, smoothed.y, color=BLUE, linewidth=2.2, label="training (smoothed)")
        if len(held_out):
            drawn = thin(held_out, 2 * WIDTH * DPI)
            axes.plot(
                drawn.x, drawn.y, color=ORANGE, linewidth=1.2, marker="o", markersize=6.5,
                markeredgecolor="white", label=f"held-out, last {held_out.y[-1]:.3f}", zorder=4,
            )  # fmt: skip
        for (name, value), colour in zip((levels or {}).items(), LEVELS * len(levels or {}), strict=False):
            axes.axhline(value, color=colour, linewidth=1.3, linestyle=(0, (5, 3)), zorder=1)
            axes.annotate(
                f"{name} {value:.2f}", (1.0, value), xycoords=("axes fraction", "data"), xytext=(-4, 4),
                textcoords="offset points", ha="right", color=colour, fontsize=10,
            )  # fmt: skip
        axes.set_title(title, loc="left", fontsize=13, fontweight="bold", pad=12)
        axes.set_xlabel(X_LABELS[x])
        axes.set_ylabel("loss (nats per token)")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.grid(axis="y", color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.margins(x=0.015)
        if len(train) or len(held_out):
            axes.legend(frameon=False, loc="upper right")
        _save(figure, Path(path))


def _save(figure: "Figure", path: Path) -> None:
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=DPI, facecolor="white")
    replace_file(path, picture.getvalue())

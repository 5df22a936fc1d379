"""PNG figures of a run by matplotlib: the loss curve and the load of every expert. For a README, a mail, a terminal."""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gpt4moe.pages.series import points, smooth, smoothing_span
from gpt4moe.runlog.atomic_file import replace_file
from gpt4moe.runlog.balance import ExpertLoad
from gpt4moe.runlog.metrics import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, SOFT, GRID = "#1f2933", "#6b7785", "#e4e8ee"
BLUE, ORANGE, RED = "#2563eb", "#ea580c", "#dc2626"
LEVELS = ("#7c3aed", "#0f766e", "#b45309")
X_LABELS = {"consumed_tokens": "tokens", "step": "step"}
STYLE = {
    "font.size": 11, "axes.edgecolor": SOFT, "axes.labelcolor": INK, "text.color": INK, "xtick.color": SOFT,
    "ytick.color": SOFT, "axes.spines.top": False, "axes.spines.right": False,
}  # fmt: skip


def plot_loss(
    path: Path | str,
    records: Sequence[Record],
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

    with matplotlib.rc_context(STYLE):
        # Figure without pyplot: no global state, no display, whatever backend the machine is set to.
        figure = Figure(figsize=(9, 5), layout="constrained")
        axes = figure.add_subplot()
        train = points(records, "loss", x=x)
        held_out = points(records, "eval_loss", x=x)
        if train:
            axes.plot(*zip(*train, strict=True), color=BLUE, linewidth=0.8, alpha=0.3)
            smoothed = smooth(train, smoothing_span(len(train)))
            axes.plot(*zip(*smoothed, strict=True), color=BLUE, linewidth=2.2, label="training (smoothed)")
        if held_out:
            axes.plot(
                *zip(*held_out, strict=True), color=ORANGE, linewidth=1.2, marker="o", markersize=6.5,
                markeredgecolor="white", label=f"held-out, last {held_out[-1][1]:.3f}", zorder=4,
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
        if train or held_out:
            axes.legend(frameon=False, loc="upper right")
        _save(figure, Path(path))


def plot_expert_load(path: Path | str, load: ExpertLoad, *, title: str) -> None:
    """Draw each expert's share of its layer's tokens (1 = even) as a PNG heat map; a dead expert is red."""
    import matplotlib
    from matplotlib.figure import Figure

    ratios = load.ratios()
    num_layers, num_experts = len(ratios), len(ratios[0])
    with matplotlib.rc_context(STYLE):
        height = min(12.0, max(3.0, 1.7 + 0.42 * num_layers))
        figure = Figure(figsize=(min(14.0, max(6.5, 2.6 + 0.5 * num_experts)), height), layout="constrained")
        axes = figure.add_subplot()
        # Doubling and halving are equally far from even; four times is the end of the scale.
        image = axes.imshow(
            [[math.log2(max(ratio, 0.25)) if ratio > 0 else math.nan for ratio in row] for row in ratios],
            cmap=matplotlib.colormaps["PuOr_r"].with_extremes(bad=RED), vmin=-2, vmax=2, aspect="auto",
            interpolation="nearest",
        )  # fmt: skip
        if num_experts <= 24 and num_layers <= 24:
            _label_cells(axes, ratios)
        axes.set_xticks(range(0, num_experts, math.ceil(num_experts / 32)))
        step = math.ceil(num_layers / 24)
        worst = load.max_over_mean()
        axes.set_yticks(range(0, num_layers, step), [str(layer) for layer in load.layers[::step]])
        busiest = axes.secondary_yaxis("right")
        busiest.set_yticks(range(0, num_layers, step), [f"{ratio:.2f}" for ratio in worst[::step]])
        busiest.set_ylabel("busiest / mean")
        for side in (axes, busiest):
            side.spines[:].set_visible(False)
            side.tick_params(length=0)
        num_dead = len(load.dead_experts())
        axes.set_xlabel(f"expert ({num_dead} red: got no token)" if num_dead else "expert")
        axes.set_ylabel("MoE layer")
        axes.set_title(title, loc="left", fontsize=13, fontweight="bold", pad=12)
        bar = figure.colorbar(image, ax=axes, pad=0.02, ticks=[-2, -1, 0, 1, 2])
        bar.ax.set_yticklabels(["≤ ¼", "½", "even", "2", "≥ 4"])
        bar.set_label("tokens / layer's mean")
        bar.outline.set_visible(False)
        _save(figure, Path(path))


def _label_cells(axes: "Axes", ratios: Sequence[Sequence[float]]) -> None:
    for row, values in enumerate(ratios):
        for column, ratio in enumerate(values):
            is_dark = abs(math.log2(max(ratio, 0.25))) > 1.2
            text = f"{ratio:.1f}" if ratio > 0 else "dead"
            axes.text(column, row, text, ha="center", va="center", fontsize=9, color="white" if is_dark else INK)


def _save(figure: "Figure", path: Path) -> None:
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=140, facecolor="white")
    replace_file(path, picture.getvalue())

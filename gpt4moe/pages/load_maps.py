"""Expert load over time as small heat maps in a row: one for each window of steps, a dot for each layer and expert.

Cells of one colour are one SVG path of strokes, so that 120 layers x 16 experts x 8 maps are some 100 kB.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gpt4moe.pages.heat_map import strength
from gpt4moe.runlog.expert_load import LoadWindow

MAX_MAPS, MAX_CELLS = 8, 40_000
# A cell is drawn in one of these looks; between an even share and a quarter or four times of it are so many shades.
SHADES = 4


def load_maps(windows: Sequence[LoadWindow], layers: Sequence[int]) -> str:
    """The maps as <figure>, from the first window to the last; nothing for fewer than two.

    Args: layers: global indices of the MoE layers, the rows of a window.
    """
    if len(windows) < 2:
        return ""
    count = max(2, min(MAX_MAPS, len(windows), MAX_CELLS // windows[0].tokens.size))
    shown = [windows[round(place)] for place in np.linspace(0, len(windows) - 1, count)]
    maps = "".join(_map(window, layers) for window in shown)
    return (
        '<figure class="chart wide"><h3>Expert load over time <span class="unit">as above; rows are layers '
        f"{layers[0]} to {layers[-1]}, columns experts 0 to {windows[0].tokens.shape[1] - 1}</span></h3>"
        f'<div class="maps">{maps}</div></figure>'
    )


def _map(window: LoadWindow, layers: Sequence[int]) -> str:
    rows, columns = window.tokens.shape
    paths = "".join(
        f'<path class="{look}" stroke-opacity="{opacity:.2f}" d="{strokes}"/>'
        for look, opacity, strokes in _strokes(window.tokens)
    )
    busiest = (window.tokens.max(axis=1) * columns / np.maximum(window.tokens.sum(axis=1), 1)).max()
    dead = int((window.tokens == 0).sum())
    steps = f"steps {window.first_step:,} to {window.last_step:,}"
    more = f", {dead} dead" if dead else ""
    return (
        f'<div class="map"><svg viewBox="0 0 {columns} {rows}" preserveAspectRatio="none" role="img" '
        f'aria-label="expert load, {steps}"><rect class="floor" width="{columns}" height="{rows}"/>{paths}</svg>'
        f"<span>{steps}</span><span>busiest {busiest:.2f}{more}</span></div>"
    )


def _strokes(tokens: NDArray[np.float64]) -> list[tuple[str, float, str]]:
    """(look, opacity, path data) of every colour that occurs; neighbours of one colour are one stroke."""
    colours = [[_colour(ratio) for ratio in row] for row in _ratios(tokens).tolist()]
    strokes: dict[tuple[str, float], list[str]] = {}
    for y, row in enumerate(colours):
        start = 0
        for x in range(1, len(row) + 1):
            if x == len(row) or row[x] != row[start]:
                strokes.setdefault(row[start], []).append(f"M{start} {y}.5h{x - start}")
                start = x
    return [(look, opacity, "".join(parts)) for (look, opacity), parts in strokes.items() if opacity > 0]


def _colour(ratio: float) -> tuple[str, float]:
    if ratio == 0:
        return "dead", 1.0
    return ("over" if ratio > 1 else "under"), round(strength(ratio) * SHADES) / SHADES


def _ratios(tokens: NDArray[np.float64]) -> NDArray[np.float64]:
    ratios: NDArray[np.float64] = tokens / np.maximum(tokens.mean(axis=1, keepdims=True), 1e-300)
    return ratios

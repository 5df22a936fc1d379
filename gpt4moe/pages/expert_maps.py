"""Expert load as inline SVG: a cell for each MoE layer and expert, coloured by its share of the layer's tokens.

heat_map is one large map of the last steps, with numbers. load_maps is a row of small maps, one for each window of
steps. In a small map all cells of one colour are one SVG path: 120 layers x 16 experts x 8 maps take some 100 kB.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gpt4moe.runlog.expert_load import ExpertLoad, LoadWindow

WIDTH, LEFT, RIGHT_COLUMN, TOP, BOTTOM = 1100.0, 50.0, 80.0, 24.0, 26.0
MAX_HEIGHT = 640.0
NAMED_DEAD = 12


def heat_map(load: ExpertLoad) -> str:
    """The map as <figure>. A tooltip shows the numbers of a cell; a sentence below names the dead experts."""
    ratios, worst = load.ratios(), load.max_over_mean()
    num_layers, num_experts = len(ratios), len(ratios[0])
    cell_width = (WIDTH - LEFT - RIGHT_COLUMN) / num_experts
    cell_height = min(30.0, max(4.0, MAX_HEIGHT / num_layers))
    height = TOP + num_layers * cell_height + BOTTOM
    gap = 1.5 if min(cell_width, cell_height) > 8 else 0.0
    has_text = cell_width >= 26 and cell_height >= 16
    every_layer = math.ceil(14 / cell_height)
    every_expert = 2 ** max(0, math.ceil(math.log2(28 / cell_width)))
    parts = [f'<text class="tick" x="{WIDTH:g}" y="{TOP - 8:g}" text-anchor="end">max / mean</text>']
    parts.append(f'<text class="tick" x="{LEFT - 8:g}" y="{TOP - 8:g}" text-anchor="end">layer</text>')
    area = f'width="{num_experts * cell_width - gap:.1f}" height="{num_layers * cell_height - gap:.1f}"'
    parts.append(f'<rect class="floor" x="{LEFT:g}" y="{TOP:g}" {area}/>')
    for row, layer in enumerate(load.layers):
        y = TOP + row * cell_height
        for expert, ratio in enumerate(ratios[row]):
            x = LEFT + expert * cell_width
            parts.append(_cell(x, y, cell_width - gap, cell_height - gap, layer=layer, expert=expert, ratio=ratio))
            if has_text:
                middle_x, middle_y = x + (cell_width - gap) / 2, y + (cell_height - gap) / 2 + 4
                text = f"{ratio:.1f}" if ratio > 0 else "dead"
                strong = " strong" if ratio == 0 or abs(math.log2(ratio)) > 1.3 else ""
                parts.append(f'<text class="cell{strong}" x="{middle_x:.1f}" y="{middle_y:.1f}">{text}</text>')
        if row % every_layer == 0:
            base = y + cell_height / 2 + 4
            parts.append(f'<text class="tick" x="{LEFT - 8:g}" y="{base:.1f}" text-anchor="end">{layer}</text>')
            parts.append(f'<text class="worst" x="{WIDTH:g}" y="{base:.1f}" text-anchor="end">{worst[row]:.2f}</text>')
    for expert in range(0, num_experts, every_expert):
        x = LEFT + (expert + 0.5) * cell_width
        parts.append(f'<text class="tick" x="{x:.1f}" y="{height - 8:.1f}" text-anchor="middle">{expert}</text>')
    return (
        '<figure class="chart wide"><h3>Expert load <span class="unit">tokens over the layer\'s mean; '
        f'columns are experts</span></h3>{_scale()}<svg viewBox="0 0 {WIDTH:g} {height:.0f}" role="img" '
        f'aria-label="tokens of each expert in each MoE layer">{"".join(parts)}</svg>'
        f"<figcaption>{balance_sentence(load)}</figcaption></figure>"
    )


def balance_sentence(load: ExpertLoad) -> str:
    """A sentence with the layer of the busiest expert, and the names of dead experts."""
    worst = load.max_over_mean()
    ratio, layer = max(zip(worst, load.layers, strict=True))
    sentence = f"Busiest expert: {ratio:.2f} times the mean, in layer {layer}. "
    dead = load.dead_experts()
    if not dead:
        return sentence + "No dead expert."
    names = ", ".join(f"layer {layer} expert {expert}" for layer, expert in dead[:NAMED_DEAD])
    more = f" and {len(dead) - NAMED_DEAD} more" if len(dead) > NAMED_DEAD else ""
    noun = "expert" if len(dead) == 1 else "experts"
    return f"{sentence}<strong>{len(dead)} dead {noun}</strong> (no token): {names}{more}."


def _cell(x: float, y: float, width: float, height: float, *, layer: int, expert: int, ratio: float) -> str:
    look, opacity = "dead", 1.0
    if ratio > 0:
        look, opacity = ("over" if ratio > 1 else "under"), strength(ratio)
    return (
        f'<rect class="{look}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" '
        f'fill-opacity="{opacity:.2f}"><title>layer {layer}, expert {expert}: {ratio:.3f} x mean</title></rect>'
    )


def strength(ratio: float) -> float:
    """Colour strength: 0 for an even share, 1 for four times or a quarter of it. The power lifts values in between."""
    return float(min(1.0, abs(math.log2(ratio)) / 2) ** 0.7)


def _scale() -> str:
    steps = {"≤ ¼": 0.25, "½": 0.5, "1 = even": 1.0, "2": 2.0, "≥ 4": 4.0}
    swatches = "".join(
        f'<span class="swatch"><i><b class="{"over" if ratio > 1 else "under"}" style="opacity:{strength(ratio):.2f}">'
        f"</b></i>{name}</span>"
        for name, ratio in steps.items()
    )
    return f'<div class="legend">{swatches}<span class="swatch"><i><b class="dead"></b></i>dead</span></div>'


MAX_MAPS, MAX_CELLS = 8, 40_000
# The looks of a cell, and the number of shades between an even share and a quarter or four times of it.
SHADES = 4


def load_maps(windows: Sequence[LoadWindow], layers: Sequence[int]) -> str:
    """The maps as <figure>, from the first window to the last; empty for fewer than two windows.

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
    """(look, opacity, path data) of each colour in the map. Neighbouring cells of one colour are one stroke."""
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

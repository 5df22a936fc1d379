"""Line charts as inline SVG, without a charting library, in the colours of the page's theme.

    points -> Chart(series, levels, marks) -> scale -> <svg> with axes and paths, and its points as JSON for the
    script of the page

Colours are CSS variables of report_page.py, so a chart follows the light or dark theme. Sizes are in pixels.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Literal

from gpt4moe.runlog.console import short_count

Point = tuple[float, float]
Bar = tuple[float, float, float]
"""x, least, most."""

SIZE, WIDE_SIZE = (540.0, 250.0), (1100.0, 360.0)
LEFT, RIGHT_GAP, TOP, BOTTOM_GAP = 50.0, 14.0, 14.0, 40.0
LABEL = 7.0
"""Width of a digit of the axes' numbers."""
MAX_POINTS, MAX_WIDE_POINTS = 300, 600
NUM_COLOURS = 9


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """One curve. `look` is a class of the style sheet: raw is thin and pale, line is bold, dots has a point each."""

    name: str
    points: Sequence[Point]
    look: Literal["raw", "line", "dots"] = "line"
    bar: Bar | None = None
    """What one point may turn out as, drawn as an upright line."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """What to draw."""

    title: str
    unit: str
    series: Sequence[Series]
    levels: Mapping[str, float] = field(default_factory=dict)
    """name -> value, horizontal lines."""
    marks: Mapping[str, float] = field(default_factory=dict)
    """name -> step, vertical lines."""
    log_y: bool = False
    x_name: str = "step"
    log_x: bool = False
    """Every x is then above 0."""
    first_colour: int = 0
    """Index of the first curve's colour class (c0, c1, ...). c0 is for a raw curve under its smoothed one."""
    is_wide: bool = False
    """Whether the chart takes the whole width of the page."""


@dataclass(frozen=True, slots=True)
class Axis:
    """Maps data to viewBox units, linear or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False
    whole: bool = False
    """Whether ticks are whole numbers, as for steps."""

    def place(self, value: float) -> float:
        low, high = (math.log10(self.low), math.log10(self.high)) if self.log else (self.low, self.high)
        at = math.log10(max(value, self.low)) if self.log else value
        return self.start + (at - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            factors = (1, 2, 5) if len(powers) <= 3 else (1,)
            candidates = [factor * 10.0**power for power in powers for factor in factors]
            every = max(1, len(candidates) // 8)
            return [tick for tick in candidates[::every] if self.low <= tick <= self.high]
        step = nice_step((self.high - self.low) / 6)
        if self.whole:
            step = float(math.ceil(step))
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def nice_step(rough: float) -> float:
    """The next of 1, 2, 2.5, 5 x 10^n."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1.0, 2.0, 2.5, 5.0, 10.0) if factor * power >= rough * 0.999)


def value_axis(values: Sequence[float], bottom: float, *, log: bool) -> Axis:
    """From `bottom` up to TOP, with some air above and below; logarithmic only where every value is positive."""
    low, high = min(values), max(values)
    if log and low > 0:
        return Axis(low / 1.15, high * 1.15, bottom, TOP, log=True)
    # Differences of round-off alone are drawn as a flat line.
    air = (high - low) * 0.06 if high - low > 1e-9 * abs(high) else abs(high) * 0.1 or 1.0
    # If no value is negative, the axis does not go below zero.
    return Axis(max(low - air, 0.0) if low >= 0 else low - air, high + air, bottom, TOP)


def line_chart(chart: Chart) -> str:
    """The chart as <figure>. If there is nothing to draw, a sentence takes the place of the picture."""
    series = [one for one in chart.series if one.points]
    heading = f'<h3>{escape(chart.title)} <span class="unit">{escape(chart.unit)}</span></h3>'
    look = "chart wide" if chart.is_wide else "chart"
    if not series:
        return f'<figure class="{look}">{heading}<p class="none">not recorded in this run</p></figure>'
    steps = [x for s in series for x, _ in s.points]
    width, height = WIDE_SIZE if chart.is_wide else SIZE
    values = [y for s in series for y in (*(y for _, y in s.points), *(s.bar or ())[1:])] + list(chart.levels.values())
    y_axis = value_axis(values, height - BOTTOM_GAP, log=chart.log_y)
    left = max(LEFT, 14 + LABEL * max((len(label) for label in axis_labels(y_axis.ticks())), default=0))
    last = max(max(steps), min(steps) + 1)
    x_axis = Axis(min(steps), last, left, width - RIGHT_GAP, log=chart.log_x, whole=True)
    parts = (
        _grid(x_axis, y_axis, chart.x_name)
        + _marks(chart.marks, x_axis, y_axis)
        + _levels(chart.levels, x_axis, y_axis)
    )
    for index, s in enumerate(series):
        parts.extend(_curve(s, x_axis, y_axis, _colour(index, chart.first_colour)))
    label = f"{chart.title} over {chart.x_name}"
    legend = _legend(series, chart.first_colour)
    return (
        f'<figure class="{look}" data-chart="{escape(_hover_data(series, x_axis))}">{heading}{legend}'
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}">{"".join(parts)}'
        f'<line class="cursor" y1="{TOP:g}" y2="{y_axis.start:g}" hidden></line></svg>'
        '<output class="tip" hidden></output></figure>'
    )


def _grid(x_axis: Axis, y_axis: Axis, x_name: str) -> list[str]:
    parts = []
    left, ticks = x_axis.start, y_axis.ticks()
    for tick, label in zip(ticks, axis_labels(ticks), strict=True):
        y = y_axis.place(tick)
        parts.append(f'<line class="grid" x1="{left:g}" x2="{x_axis.end:g}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{left - 8:g}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    for tick in x_axis.ticks():
        x = x_axis.place(tick)
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{y_axis.start + 18:g}" text-anchor="middle">{axis_number(tick)}</text>'
        )
    parts.append(f'<line class="axis" x1="{left:g}" x2="{x_axis.end:g}" y1="{y_axis.start:g}" y2="{y_axis.start:g}"/>')
    parts.append(
        f'<text class="tick" x="{x_axis.end:g}" y="{y_axis.start + 34:g}" text-anchor="end">{escape(x_name)}</text>'
    )
    return parts


def _levels(levels: Mapping[str, float], x_axis: Axis, y_axis: Axis) -> list[str]:
    parts = []
    for index, (name, value) in enumerate(levels.items()):
        y = y_axis.place(value)
        parts.append(
            f'<line class="level l{index}" x1="{x_axis.start:g}" x2="{x_axis.end:g}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        text = f"{escape(name)} {value:.2f}"
        parts.append(
            f'<text class="level-name l{index}" x="{x_axis.end:g}" y="{y - 6:.1f}" text-anchor="end">{text}</text>'
        )
    return parts


def _marks(marks: Mapping[str, float], x_axis: Axis, y_axis: Axis) -> list[str]:
    parts = []
    for name, step in marks.items():
        if x_axis.low <= step <= x_axis.high:
            x = x_axis.place(step)
            parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP:g}" y2="{y_axis.start:g}"/>')
            parts.append(f'<text class="mark-name" x="{x + 5:.1f}" y="{TOP + 10:g}">{escape(name)}</text>')
    return parts


def _colour(index: int, first: int) -> int:
    """Index of a colour class: c0 to c9, then c1 again."""
    return first + index if first + index <= NUM_COLOURS else (first + index - 1) % NUM_COLOURS + 1


def _curve(series: Series, x_axis: Axis, y_axis: Axis, colour: int) -> list[str]:
    places = [(x_axis.place(x), y_axis.place(y)) for x, y in series.points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    parts = [f'<polyline class="{series.look} c{colour}" points="{path}"/>']
    if series.look == "dots" or len(places) == 1:
        parts.extend(f'<circle class="dot c{colour}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>' for x, y in places)
    if series.bar is not None:
        x, (low, high) = x_axis.place(series.bar[0]), map(y_axis.place, series.bar[1:])
        parts.append(f'<line class="bar c{colour}" x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>')
    return parts


def _legend(series: Sequence[Series], first_colour: int) -> str:
    if len(series) < 2:
        return ""
    keys = "".join(
        f'<span class="key {s.look} c{_colour(index, first_colour)}">{escape(s.name)}</span>'
        for index, s in enumerate(series)
    )
    return f'<div class="legend">{keys}</div>'


def _hover_data(series: Sequence[Series], x_axis: Axis) -> str:
    """Points as JSON for the page's script: the step, and the value as text."""
    curves = [
        {"name": s.name, "x": [x for x, _ in s.points], "text": [f"{y:.5g}" for _, y in s.points]} for s in series
    ]
    return json.dumps(
        {"low": x_axis.low, "high": x_axis.high, "left": x_axis.start, "right": x_axis.end, "curves": curves}
    )


def axis_labels(ticks: Sequence[float]) -> list[str]:
    """The shortest labels that differ from each other: 1.001M and 1.002M, not 1M twice."""
    for digits in range(2, 8):
        labels = [axis_number(tick, digits) for tick in ticks]
        if len(set(labels)) == len(labels):
            break
    return labels if ticks else []


def axis_number(value: float, digits: int = 2) -> str:
    """0, 0.25, 1500 -> 1.5k, 3e-4. `digits` of the mantissa are kept; one more from 1000 on."""
    if value and abs(value) < 1e-3:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return short_count(value, digits + 1) if abs(value) >= 1000 else f"{value:.6g}"

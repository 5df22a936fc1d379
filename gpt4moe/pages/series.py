"""Records of steps -> points of a curve, thinned and smoothed for drawing. The figures and the report share it."""

import math
from collections.abc import Sequence

from gpt4moe.runlog.metrics import Record

Point = tuple[float, float]


def points(records: Sequence[Record], name: str, *, x: str = "step") -> list[Point]:
    """(x, value) of every record that has the metric and a finite value of it, in order."""
    return [(r[x], r[name]) for r in records if name in r and x in r and math.isfinite(r[name])]


def smooth(curve: Sequence[Point], span: float) -> list[Point]:
    """Exponential moving average over about `span` points, from both sides: it does not lag behind a falling loss."""
    forward = _average(curve, span)
    backward = _average(curve[::-1], span)[::-1]
    return [(x, (past + future) / 2) for (x, past), (_, future) in zip(forward, backward, strict=True)]


def _average(curve: Sequence[Point], span: float) -> list[Point]:
    # total / weight: without it the average would start at zero, or cling to the first point.
    keep = 1.0 - 2.0 / (max(span, 1.0) + 1.0)
    total = weight = 0.0
    averaged = []
    for x, value in curve:
        total = keep * total + (1.0 - keep) * value
        weight = keep * weight + (1.0 - keep)
        averaged.append((x, total / weight))
    return averaged


def smoothing_span(num_points: int) -> float:
    """A span that follows a curve's turns and hides its noise: a thirtieth of it, from 3 to 200 points."""
    return min(200.0, max(3.0, num_points / 30))


def thin(curve: Sequence[Point], limit: int) -> list[Point]:
    """At most `limit` points: of each bucket the lowest and the highest, so that no spike gets lost."""
    if len(curve) <= limit:
        return list(curve)
    size = math.ceil(len(curve) / (limit // 2))
    kept: list[Point] = []
    for start in range(0, len(curve), size):
        bucket = range(start, min(start + size, len(curve)))
        ends = {min(bucket, key=lambda i: curve[i][1]), max(bucket, key=lambda i: curve[i][1])}
        kept.extend(curve[i] for i in sorted(ends))
    return kept


def middle(values: Sequence[float]) -> float | None:
    """The median; None of nothing."""
    ordered = sorted(values)
    return ordered[len(ordered) // 2] if ordered else None

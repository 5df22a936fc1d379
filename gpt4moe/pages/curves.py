"""Curves of a run's metrics as arrays: a metric -> its points -> smoothed, thinned -> points that a chart draws."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from gpt4moe.pages.charts import Point
from gpt4moe.runlog.metrics_columns import MetricColumns

_BLOCK = 128


@dataclass(frozen=True, slots=True)
class Curve:
    """Points in order; both arrays have one length."""

    x: NDArray[np.float64]
    y: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.x)

    def points(self) -> list[Point]:
        """(x, y); whole x as integers, as a step is written."""
        whole = self.x.astype(np.int64)
        x = whole if np.array_equal(whole, self.x) else self.x
        return list(zip(x.tolist(), self.y.tolist(), strict=True))


def curve_of(columns: MetricColumns, name: str, *, x: str = "step") -> Curve:
    """Every step that has the metric and a finite value of it."""
    along, values = columns.column(name, x=x)
    is_finite = np.isfinite(values)
    return Curve(along[is_finite], values[is_finite])


def smooth(curve: Curve, span: float) -> Curve:
    """Exponential moving average over about `span` points, in both directions, so that it does not lag behind."""
    return Curve(curve.x, (_average(curve.y, span) + _average(curve.y[::-1], span)[::-1]) / 2)


def _average(values: NDArray[np.float64], span: float) -> NDArray[np.float64]:
    """total[t] / weight[t], where total[t] = keep * total[t - 1] + (1 - keep) * value[t], and weight is the total of
    ones: a plain average would start at zero, or depend too much on the first point."""
    keep = 1.0 - 2.0 / (max(span, 1.0) + 1.0)
    # Within a block of points the totals are one matrix product. From one to the next goes the total of its last point.
    place = np.arange(_BLOCK)
    within = (1.0 - keep) * np.tril(keep ** np.abs(place[:, None] - place))
    since, num_blocks = keep ** (place + 1.0), math.ceil(len(values) / _BLOCK)
    blocks = np.concatenate([values, np.zeros(num_blocks * _BLOCK - len(values))]).reshape(num_blocks, _BLOCK)
    totals = blocks @ within.T
    carried = list(accumulate(totals[:, -1].tolist(), lambda total, own: float(since[-1]) * total + own))
    totals[1:] += np.outer(carried[:-1], since)
    weights = 1.0 - np.outer(since[-1] ** np.arange(num_blocks), since)
    averaged: NDArray[np.float64] = (totals / weights).reshape(-1)[: len(values)]
    return averaged


def smoothing_span(num_points: int) -> float:
    """The span for a curve: a thirtieth of its points, from 3 to 200. It shows trends and hides noise."""
    return min(200.0, max(3.0, num_points / 30))


def thin(curve: Curve, limit: int) -> Curve:
    """At most `limit` points: the lowest and the highest of each bucket, so that spikes stay visible."""
    if len(curve) <= limit:
        return curve
    size = math.ceil(len(curve) / (limit // 2))
    starts = np.arange(0, len(curve), size)
    padding = np.full(len(starts) * size - len(curve), np.nan)
    buckets = np.concatenate([curve.y, padding]).reshape(-1, size)
    kept = np.unique([starts + np.nanargmin(buckets, axis=1), starts + np.nanargmax(buckets, axis=1)])
    return Curve(curve.x[kept], curve.y[kept])


def middle(values: Sequence[float] | NDArray[np.float64]) -> float | None:
    """The median; None for no values."""
    return float(np.sort(values)[len(values) // 2]) if len(values) else None

"""Curves keep what matters: spikes survive thinning, smoothing does not lag, and is the sum that it stands for."""

import math

import numpy as np
import pytest

from gpt4moe.pages.curves import Curve, curve_of, middle, smooth, thin
from gpt4moe.runlog.metrics_columns import MetricColumns


def test_missing_and_nonfinite_values_are_no_points() -> None:
    records = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": math.nan}, {"step": 3}, {"step": 4, "loss": 1.0}]
    points = curve_of(MetricColumns(records), "loss").points()
    assert points == [(1, 2.0), (4, 1.0)] and type(points[0][0]) is int


def test_a_single_spike_survives_thinning() -> None:
    steps, values = np.arange(100_000.0), np.ones(100_000)
    values[54_321], values[11] = 99.0, -3.0
    thinned = thin(Curve(steps, values), 600).points()
    assert len(thinned) <= 600 and {(54_321, 99.0), (11, -3.0)} <= set(thinned)
    assert thinned == sorted(thinned)


@pytest.mark.parametrize("num_points", [5, 601, 1234])
def test_of_each_bucket_the_first_lowest_and_the_first_highest_are_kept(num_points: int) -> None:
    values = np.random.default_rng(num_points).integers(0, 9, num_points).astype(float)
    kept, size = thin(Curve(np.arange(num_points) / 2, values), 60), math.ceil(num_points / 30)
    curve = list(zip((np.arange(num_points) / 2).tolist(), values.tolist(), strict=True))
    expected = curve
    if num_points > 60:
        buckets = [curve[at : at + size] for at in range(0, num_points, size)]
        ends = [{min(each, key=lambda it: it[1]), max(each, key=lambda it: it[1])} for each in buckets]
        expected = sorted(point for each in ends for point in each)
    assert kept.points() == expected


def test_smoothing_a_straight_line_does_not_lag() -> None:
    steps = np.arange(300.0)
    line = Curve(steps, 5.0 - 0.01 * steps)
    # Away from the ends; an average over the past alone would be 0.05 too high.
    assert np.abs(smooth(line, 10).y - line.y)[60:240].max() < 1e-4


@pytest.mark.parametrize("num_points", [0, 1, 2, 300, 5000])
@pytest.mark.parametrize("span", [1.0, 7.0, 200.0])
def test_smoothing_is_the_average_added_up_point_by_point(num_points: int, span: float) -> None:
    values = np.random.default_rng(1).random(num_points) * 1e3
    keep = 1.0 - 2.0 / (span + 1.0)

    def one_way(curve: list[float]) -> np.ndarray:
        total, weight, averaged = 0.0, 0.0, []
        for value in curve:
            total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
            averaged.append(total / weight)
        return np.array(averaged)

    expected = (one_way(values.tolist()) + one_way(values[::-1].tolist())[::-1]) / 2
    # A few hundred products of round-off 1e-16 each.
    np.testing.assert_allclose(smooth(Curve(np.arange(float(num_points)), values), span).y, expected, rtol=1e-12)


def test_the_median_is_a_value_of_the_run() -> None:
    assert middle([3.0, 1.0, 2.0, 9.0]) == 3.0 and middle([]) is None

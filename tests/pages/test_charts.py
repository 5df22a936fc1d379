"""Axes have few, round, different labels; balance names the dead."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt4moe.pages.charts import Axis, axis_labels, axis_number
from tests.runlog.synthetic import uneven_load


def test_a_dead_expert_is_named_by_its_layer_and_number() -> None:
    load = uneven_load()
    assert load.dead_experts() == [(2, 1)]
    assert load.max_over_mean() == [300 / 150, 300 / 125]


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_lie_on_the_axis_and_are_few(low: float, span: float) -> None:
    axis = Axis(low, low + span, 0.0, 100.0)
    ticks = axis.ticks()
    assert 2 <= len(ticks) <= 8
    assert all(-0.1 <= axis.place(tick) <= 100.1 for tick in ticks)


def test_a_logarithmic_axis_places_decades_evenly() -> None:
    axis = Axis(0.1, 1000.0, 0.0, 400.0, log=True)
    assert [axis.place(v) for v in (0.1, 1.0, 10.0, 1000.0)] == pytest.approx([0, 100, 200, 400])
    assert {1.0, 10.0, 100.0} <= set(axis.ticks())


def test_labels_of_one_axis_differ() -> None:
    assert axis_labels([1.001e6, 1.002e6]) == ["1.001M", "1.002M"]
    assert axis_labels([1e6, 2e6]) == ["1M", "2M"]
    assert axis_labels([1.23e-4, 1.24e-4]) == ["1.23e-4", "1.24e-4"]
    assert axis_labels([]) == []


def test_steps_have_whole_ticks() -> None:
    assert Axis(1, 3, 0, 100, whole=True).ticks() == [1, 2, 3]
    assert all(tick == int(tick) for tick in Axis(1, 13, 0, 100, whole=True).ticks())


def test_axis_numbers_are_short() -> None:
    assert [axis_number(v) for v in (0, 0.25, 1500, 3e-4, 7.5e-5)] == ["0", "0.25", "1.5k", "3e-4", "7.5e-5"]

"""A flat range of a box is a few contiguous rectangles, exactly and in order."""

from math import prod

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt4moe.parallel.shard import Rectangle, flat_rectangles


def test_a_range_within_rows_is_head_rows_and_tail() -> None:
    assert flat_rectangles(3, 21, (5, 5)) == [
        Rectangle(3, (0, 3), (1, 2)),
        Rectangle(5, (1, 0), (3, 5)),
        Rectangle(20, (4, 0), (1, 1)),
    ]


@settings(max_examples=300, deadline=None)
@given(shape=st.lists(st.integers(1, 5), min_size=1, max_size=5).map(tuple), data=st.data())
def test_rectangles_are_the_range_exactly_and_in_order(shape: tuple[int, ...], data: st.DataObject) -> None:
    start = data.draw(st.integers(0, prod(shape)))
    end = data.draw(st.integers(start, prod(shape)))
    numbers = np.arange(prod(shape)).reshape(shape)
    found: list[int] = []
    parts = flat_rectangles(start, end, shape)
    for part in parts:
        box = numbers[tuple(slice(o, o + n) for o, n in zip(part.offset, part.shape, strict=True))]
        assert box.shape == part.shape
        assert part.start == start + len(found)
        found += box.reshape(-1).tolist()
    assert found == list(range(start, end))
    assert len(parts) <= 2 * len(shape) - 1

"""A shuffle without a table: a bijection, fixed for good, another one for every seed, epoch and source."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt4moe.data.permutation import Permutation


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 700), seed=st.integers(0, 2**63), epoch=st.integers(0, 1000), source=st.text(max_size=8))
def test_every_index_appears_exactly_once(size: int, seed: int, epoch: int, source: str) -> None:
    order = Permutation(size, seed, epoch, source)
    assert sorted(order(position) for position in range(size)) == list(range(size))


def test_the_order_never_changes_between_versions() -> None:
    order = Permutation(1000, seed=1234, epoch=0, source="python")
    assert [order(position) for position in range(8)] == [203, 979, 488, 884, 938, 768, 961, 8]


@pytest.mark.parametrize("other", [(1235, 0, "python"), (1234, 1, "python"), (1234, 0, "prose")])
def test_seed_epoch_and_source_each_give_another_order(other: tuple[int, int, str]) -> None:
    first, second = Permutation(500, 1234, 0, "python"), Permutation(500, *other)
    same = sum(first(position) == second(position) for position in range(500))
    assert same < 10  # two unrelated orders agree in one place on average


def test_neighbours_land_far_apart() -> None:
    size = 10_000
    order = Permutation(size, 1, 0, "x")
    mean_step = sum(abs(order(position + 1) - order(position)) for position in range(2000)) / 2000
    assert abs(mean_step - size / 3) < size * 0.03  # of independent uniform places: size / 3


def test_a_trillion_samples_cost_no_memory() -> None:
    order = Permutation(10**12, 1, 0, "web")
    assert all(0 <= order(position) < 10**12 for position in (0, 10**11, 10**12 - 1))


def test_a_position_outside_is_refused() -> None:
    with pytest.raises(IndexError):
        Permutation(10, 1, 0, "x")(10)


@pytest.mark.parametrize("size", [1, 2, 37, 1000, 5 * 10**9])
def test_many_positions_at_once_have_the_index_of_each(size: int) -> None:
    order = Permutation(size, 1, 0, "x")
    positions = np.arange(min(size, 1000), dtype=np.int64)
    assert order.indices(positions).tolist() == [order(position) for position in positions.tolist()]
    with pytest.raises(IndexError):
        order.indices(np.array([0, size]))

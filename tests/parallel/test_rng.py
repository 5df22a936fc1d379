"""Initial numbers depend on seed, tensor and place alone: any slice drawn anywhere is the same."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt4moe.parallel.rng import normal_box

SHAPE = (4, 2, 6, 10)


@st.composite
def boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    begin = [draw(st.integers(0, size - 1)) for size in SHAPE]
    end = [draw(st.integers(low + 1, size)) for low, size in zip(begin, SHAPE, strict=True)]
    return tuple(begin), tuple(b - a for a, b in zip(begin, end, strict=True))


@settings(max_examples=60, deadline=None)
@given(box=boxes())
def test_any_slice_equals_the_same_place_of_the_whole(box: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    offset, shape = box
    whole = normal_box(5, "w", SHAPE, (0, 0, 0, 0), SHAPE)
    place = tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))
    assert torch.equal(normal_box(5, "w", SHAPE, offset, shape), whole[place])


def test_a_vector_can_be_cut_too() -> None:
    whole = normal_box(5, "v", (20,), (0,), (20,))
    assert torch.equal(normal_box(5, "v", (20,), (7,), (4,)), whole[7:11])


def test_seed_and_name_change_every_number() -> None:
    one, other, named = (normal_box(s, n, (8, 8), (0, 0), (8, 8)) for s, n in ((1, "a"), (2, "a"), (1, "b")))
    assert not (one == other).any()
    assert not (one == named).any()


def test_numbers_are_standard_normal() -> None:
    numbers = normal_box(1, "n", (500, 400), (0, 0), (500, 400)).double()
    # 200,000 draws: the mean lies within 4 standard errors (0.009), the deviation as well.
    assert abs(numbers.mean().item()) < 0.009
    assert abs(numbers.std().item() - 1) < 0.007
    assert abs((numbers.abs() > 2).double().mean().item() - 0.0455) < 0.002

"""A set of rectangles is accepted exactly when every element lies in one and only one of them."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt4moe.checkpoint.cover import Rectangle, cover_problem, tensor_problems
from gpt4moe.config.optimizer import OptimizerKind
from gpt4moe.config.optimizer_table import OPTIMIZERS
from tests.checkpoint.builders import random_cut

ADAMW = OPTIMIZERS[OptimizerKind.adamw].states
WHOLE: list[Rectangle] = [((0, 0), (2, 4)), ((2, 0), (2, 2)), ((2, 2), (2, 2))]


def test_an_exact_cover_is_no_problem_in_any_order() -> None:
    assert cover_problem((4, 4), WHOLE) is None
    assert cover_problem((4, 4), WHOLE[::-1]) is None


def test_missing_elements_are_counted() -> None:
    assert cover_problem((4, 4), WHOLE[:2]) == "4 of 16 elements are missing"


def test_a_piece_written_twice_is_an_overlap() -> None:
    assert "overlap" in str(cover_problem((4, 4), [*WHOLE, WHOLE[1]]))


def test_an_overlap_whose_volume_makes_up_for_a_gap_is_found() -> None:
    wrong = [*WHOLE[:2], ((2, 0), (2, 2))]
    assert sum(a * b for _, (a, b) in wrong) == 16
    assert "overlap" in str(cover_problem((4, 4), wrong))


def test_a_piece_that_reaches_outside_is_named() -> None:
    assert "reaches outside" in str(cover_problem((4, 4), [((0, 0), (4, 5))]))
    assert "reaches outside" in str(cover_problem((4, 4), [((-1, 0), (4, 4))]))


@settings(max_examples=300, deadline=None)
@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple),
    seed=st.integers(0, 2**32),
    damage=st.sampled_from(["none", "drop", "double", "shift", "grow"]),
)
def test_the_answer_equals_counting_every_element(shape: tuple[int, ...], seed: int, damage: str) -> None:
    rng = random.Random(seed)
    boxes = damaged(random_cut(shape, rng.randint(0, 8), rng), damage, rng)
    count = np.zeros(shape, dtype=int)
    inside = True
    for offset, size in boxes:
        inside &= all(o >= 0 and o + n <= g for o, n, g in zip(offset, size, shape, strict=True))
        count[tuple(slice(max(o, 0), o + n) for o, n in zip(offset, size, strict=True))] += 1
    assert (cover_problem(shape, boxes) is None) == bool(inside and (count == 1).all())


def damaged(boxes: list[Rectangle], damage: str, rng: random.Random) -> list[Rectangle]:
    offset, size = boxes[0]
    axis = rng.randrange(len(size))
    changed = {
        "none": [boxes[0]],
        "drop": [],
        "double": [boxes[0], boxes[0]],
        "shift": [((*offset[:axis], offset[axis] + rng.choice((-1, 1)), *offset[axis + 1 :]), size)],
        "grow": [(offset, (*size[:axis], size[axis] + 1, *size[axis + 1 :]))],
    }
    return changed[damage] + boxes[1:]


@pytest.mark.parametrize(
    ("present", "missing"),
    [
        (["weight/a", "exp_avg/a", "exp_avg_sq/a"], []),
        (["weight/a"], []),
        (["weight/a", "weight/frozen", "exp_avg/a", "exp_avg_sq/a"], []),
        (["weight/a", "exp_avg/a", "exp_avg_sq/a", "weight/b", "exp_avg/b"], ["exp_avg_sq/b"]),
        (["exp_avg/a", "exp_avg_sq/a"], ["weight/a"]),
    ],
)
def test_a_tensor_without_its_companions_is_missing(present: list[str], missing: list[str]) -> None:
    shapes = {name: (2,) for name in present}
    boxes: dict[str, list[Rectangle]] = {name: [((0,), (2,))] for name in present}
    assert list(tensor_problems(shapes, boxes, [], ADAMW)) == [
        f"{name}: the whole tensor is missing" for name in missing
    ]


def test_a_tensor_gone_in_every_kind_is_missing_and_a_strange_one_is_named() -> None:
    shapes = {f"{kind}/a": (2,) for kind in ("weight", "exp_avg", "exp_avg_sq")} | {"buffer/b": (1,)}
    boxes = {name: [((0,), shape)] for name, shape in shapes.items()}
    assert list(tensor_problems(shapes, boxes, ["weight/a", "buffer/b"], ADAMW)) == []
    assert list(tensor_problems(shapes, boxes, ["weight/a", "weight/gone"], ADAMW)) == [
        "buffer/b: not a tensor of the model", "weight/gone: the whole tensor is missing",
    ]  # fmt: skip

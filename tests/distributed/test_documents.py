"""A document that changes moves nothing of the others, on any rank. test_layouts.py has the gradients of documents."""

from functools import cache

import numpy as np
import pytest

from gpt4moe.proof.outcome import Outcome, assemble
from tests.distributed.documents import steps_with_a_document_changed
from tests.distributed.test_gradients import assert_same
from tests.spawn import run_ranks

pytestmark = pytest.mark.layouts


FOUR_RANKS = {
    "tp2-cp2": ("parallel.tp=2", "parallel.cp=2"),
    "pp2-ep2": ("parallel.pp=2", "parallel.ep=2"),
}


@cache
def changed(world_size: int) -> dict[str, list[Outcome]]:
    """Before and after the change."""
    layouts = FOUR_RANKS if world_size == 4 else {"one process": ()}
    answers = run_ranks(world_size, steps_with_a_document_changed, layouts, {"pp2-ep2": 1} if world_size == 4 else {})
    return {name: [assemble([answer[name][at] for answer in answers]) for at in (0, 1)] for name in answers[0]}


def moved(before: Outcome, after: Outcome) -> float:
    return max(float(np.abs(after.gradients[name] - before.gradients[name]).max()) for name in before.gradients)


@pytest.mark.parametrize(("world_size", "name"), [(1, "one process"), *((4, name) for name in FOUR_RANKS)])
def test_a_changed_document_moves_losses_and_gradients_of_the_others_by_exactly_0(world_size: int, name: str) -> None:
    before, after = changed(world_size)[name]
    assert before.problems == after.problems == []
    assert before.losses == after.losses and before.norms == after.norms
    assert moved(before, after) == 0.0


def test_a_stage_that_is_not_told_of_documents_is_found() -> None:
    before, after = changed(4)["pp2-ep2, fault"]
    assert before.losses != after.losses
    assert moved(before, after) > 1e-4
    (right, _), whole = changed(4)["pp2-ep2"], changed(1)["one process"][0]
    assert_same(right, whole)
    with pytest.raises(AssertionError):
        assert_same(before, whole)

"""Copies that step together while texts arrive, as those of a server: an error of one ends all of them with its cause,
wherever the others are, and leaves nothing for the next collective."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor, distributed

from gpt4moe.config.run import RunConfig
from gpt4moe.errors import DataError, Gpt4MoeError
from gpt4moe.inference.batch import Row
from gpt4moe.inference.generation import Generator
from gpt4moe.inference.pictures import Picture, Pixels
from gpt4moe.inference.requests import Request
from gpt4moe.parallel.agreement import broadcast_int
from gpt4moe.parallel.groups import ProcessGroups
from tests.inference.cases import greedy, prompts, walk
from tests.inference.test_images import opened
from tests.spawn import run_ranks

RANKS = {"ep2": 2, "pp2-ep2": 4, "tp2-ep4": 4}
NAN = "The model's logits are NaN: its weights are not finite, or overflow in a layer."
GONE = "The picture is gone."
FAULTS = {
    # name -> copies that fail; how: while their drawn tokens are taken, or while a text joins; whether more may arrive
    "the first copy draws NaN": ({0}, NAN, True),
    "the second copy draws NaN": ({1}, NAN, True),
    "both draw NaN in one step": ({0, 1}, NAN, True),
    "the first copy draws NaN while the server closes": ({0}, NAN, False),
    "the first copy cannot read an image": ({0}, GONE, True),
    "the second copy cannot read an image": ({1}, GONE, True),
}
STEP = 3
"""Before which the fault shows."""


def _gone() -> Pixels:
    raise DataError(GONE, "Put it back.")


class _Arriving:
    """`first` before step 0, `more` before the step of the fault; None: no more will come. It is collective, as that of
    serving.Engine: before each step rank 0 sends a number."""

    def __init__(self, groups: ProcessGroups, first: Sequence[Request], more: Sequence[Request] | None):
        self.groups, self.texts, self.calls = groups, {0: first, STEP: more}, 0

    def __call__(self, is_idle: bool) -> Sequence[Request] | None:
        step = broadcast_int(self.calls, self.groups)
        assert step == self.calls, "ranks are at different steps"
        self.calls += 1
        return self.texts.get(step, [])


def _failed(generator: Generator, arriving: _Arriving) -> tuple[str, str, int, int]:
    """Cause, cure and exit status of this rank's error, and before how many steps it was asked for texts."""
    try:
        list(generator.generate([], arriving))
    except Gpt4MoeError as error:
        return error.cause, error.cure, error.exit_code, arriving.calls
    raise AssertionError("no error")


def _each_fault(chunks: list[Any], run: RunConfig, groups: ProcessGroups) -> dict[str, Any]:
    """How this rank failed in each case, and what it writes afterwards."""
    maker, found = opened(chunks, run, groups), dict[str, Any]()
    drawn = 0

    def watch(rows: Sequence[Row], logits: Tensor) -> None:
        nonlocal drawn
        drawn += 1
        if drawn == STEP and is_nan:
            logits.fill_(float("nan"))

    is_nan = False
    generator = Generator(chunks, run, groups, watch=watch, maker=maker)
    texts = [text.tokens for text in generator.generate_all(greedy(prompts()))]
    for name, (copies, cause, is_open) in FAULTS.items():
        is_mine, drawn = generator.copy_index in copies, 0
        is_nan = is_mine and cause == NAN
        first = greedy(prompts()[:2]) if is_mine or generator.copy_index else []  # the first copy may have no text
        unread = [replace(one, images=[Picture(0, "gone", _gone)]) for one in greedy(prompts()[2:3])]
        more = (unread if is_mine and cause == GONE else []) if is_open else None
        found[name] = _failed(generator, _Arriving(groups, first, more))
        distributed.barrier()
    is_nan = False
    assert [text.tokens for text in generator.generate_all(greedy(prompts()))] == texts
    return found


@pytest.mark.parametrize("layout", RANKS)
def test_an_error_of_one_copy_is_that_of_every_rank_at_once(layout: str) -> None:
    answers = run_ranks(RANKS[layout], walk, [("vision", layout)], _each_fault, timeout_seconds=90)
    for name, (_, cause, _) in FAULTS.items():
        (failed,) = {answer[name] for (answer,) in answers}
        assert failed[0] == cause and failed[2] == 2, name
        assert failed[3] == STEP + 1, f"{name}: the next exchange of texts is the last one"

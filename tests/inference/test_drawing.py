"""Flights of rows keep the stages of a pipeline busy; tokens that nobody takes do not reach the next call."""

from datetime import timedelta
from itertools import islice
from typing import Any

import pytest
from torch import distributed

from gpt4moe.config.run import RunConfig
from gpt4moe.inference.generation import Generator
from gpt4moe.inference.stages import Stages
from gpt4moe.parallel.groups import ProcessGroups
from tests.inference.cases import greedy, prompts, walk, write
from tests.spawn import run_ranks

TOKENS = 8


def _overlap(chunks: list[Any], run: RunConfig, groups: ProcessGroups) -> tuple[list[bool], list[list[int]]]:
    """On the last stage: of each of its steps, whether the first stage began the one after while the logits were held
    back; and the texts."""
    store = distributed.distributed_c10d._get_default_store()
    is_last = groups.pp.rank() == groups.pp.size() - 1
    begun: list[bool] = []
    of_stages = Stages.run

    def noting(self: Stages, attention: Any) -> Any:
        begun.append(False)
        if groups.pp.rank() == 0:
            store.set(f"begun-{len(begun)}", "yes")
        logits = of_stages(self, attention)
        if is_last:
            try:
                store.wait([f"begun-{len(begun) + 1}"], timedelta(seconds=3))
                begun[-1] = True
            except distributed.DistStoreError:
                pass
        return logits

    Stages.run = noting  # type: ignore[method-assign]
    try:
        texts = write(chunks, run, groups, greedy(prompts(), TOKENS)).texts
    finally:
        Stages.run = of_stages  # type: ignore[method-assign]
    return begun if is_last else [], [text.tokens for text in texts]


def test_the_first_stage_begins_the_next_rows_while_the_last_one_has_others() -> None:
    found = [answer for (answer,) in run_ranks(2, walk, [("top2", "pp2")], _overlap)]
    begun = next(begun for begun, _ in found if begun)
    # Two flights of rows: a step of each for each token.
    assert len(begun) == 2 * TOKENS
    assert all(begun[:-2]), begun
    assert found[0][1] == found[1][1]


def _left(chunks: list[Any], run: RunConfig, groups: ProcessGroups) -> list[list[list[int]]]:
    """Texts before and after a call that is left amid its steps."""
    generator = Generator(chunks, run, groups)
    whole = [text.tokens for text in generator.generate_all(greedy(prompts()))]
    mine = greedy(prompts()[generator.copy_index :: generator.num_copies])
    left = generator.generate([*greedy(prompts()[:1], 2), *mine])
    assert len(list(islice(left, 1))) == 1
    left.close()  # type: ignore[attr-defined]
    return [whole, [text.tokens for text in generator.generate_all(greedy(prompts()))]]


@pytest.mark.parametrize(("layout", "ranks"), [("pp2", 2), ("tp2-pp2-ep2", 4)])
def test_a_call_that_is_left_disturbs_no_other(layout: str, ranks: int) -> None:
    for ((before, after),) in run_ranks(ranks, walk, [("top2", layout)], _left):
        assert before == after

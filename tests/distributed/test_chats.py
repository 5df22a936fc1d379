"""stage=sft on layouts: the loss is the mean over all learned tokens of the global batch, wherever they are."""

from functools import cache

import numpy as np
import pytest

from gpt4moe.config.load import load_run_config
from gpt4moe.proof.outcome import Outcome, assemble
from gpt4moe.proof.plan import Phase
from tests.distributed.case import BASE
from tests.distributed.chats import chat_phases, samples
from tests.distributed.layouts import LAYOUTS, LayoutCase
from tests.distributed.runs import RATE
from tests.distributed.test_gradients import assert_same
from tests.spawn import run_ranks

pytestmark = pytest.mark.layouts

SFT = (*BASE, "stage=sft", "data.pack=false")
SHOWN = ("dp3", "pp2-cp2-ep2", "tp2-cp2-ep2-etp2", "tp2-pp2-vpp2-ep2")


@cache
def ran(layout: str, batch: tuple[str, ...] = ()) -> Outcome:
    case = LAYOUTS.get(layout, LayoutCase(1, ()))
    phase = Phase(run=load_run_config([*SFT, *case.overrides, *batch]), steps=2, descent=RATE)
    answers = run_ranks(case.world_size, chat_phases, [phase])
    return assemble([answer[0] for answer in answers])


@pytest.mark.parametrize("layout", SHOWN)
def test_loss_and_every_gradient_of_padded_conversations_equal_one_process(layout: str) -> None:
    batch = LAYOUTS[layout].batch
    got, want = ran(layout, batch), ran("one", batch)
    assert got.problems == []
    np.testing.assert_array_equal(np.array(got.columns(None)), np.array(want.columns(None)))
    assert_same(got, want)


def test_ranks_and_micro_batches_have_uneven_numbers_of_learned_tokens() -> None:
    sums = [sample.loss_mask.sum() for sample in samples(load_run_config([*SFT]))[:12]]
    pairs = np.add(sums[0::2], sums[1::2])
    assert pairs.max() >= 5 * pairs.min() > 0

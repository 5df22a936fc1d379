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
from tests.distributed.test_gradients import assert_same, distance
from tests.spawn import run_ranks

pytestmark = pytest.mark.layouts

SFT = (*BASE, "stage=sft")
KINDS = {"padded": "data.pack=false", "packed": "data.pack=true"}
SHOWN = ("dp3", "pp2-cp2-ep2", "tp2-cp2-ep2-etp2", "tp2-pp2-vpp2-ep2")
# A router's own losses count each micro-batch alike, however many tokens are in it.
NO_ROUTER_LOSSES = ("model.moe.router.load_balancing_coefficient=0", "model.moe.router.z_loss_coefficient=0")


@cache
def ran(layout: str, batch: tuple[str, ...] = ()) -> dict[str, Outcome]:
    case = LAYOUTS.get(layout, LayoutCase(1, ()))
    phases = [
        Phase(run=load_run_config([*SFT, kind, *case.overrides, *batch]), steps=2, descent=RATE)
        for kind in KINDS.values()
    ]
    if layout == "one" and not batch:  # one step of all conversations
        for kind in KINDS.values():
            rows = len(samples(load_run_config([*SFT, kind])))
            run = load_run_config(
                [*SFT, kind, *NO_ROUTER_LOSSES, f"training.global_batch_size={rows}", "training.micro_batch_size=1"]
            )
            phases.append(Phase(run=run, steps=1, descent=RATE))
    answers = run_ranks(case.world_size, chat_phases, phases)
    names = [*KINDS, *(f"all {kind}" for kind in KINDS)]
    return {name: assemble([answer[at] for answer in answers]) for at, name in enumerate(names[: len(phases)])}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", SHOWN)
def test_loss_and_every_gradient_of_conversations_equal_one_process(layout: str, kind: str) -> None:
    batch = LAYOUTS[layout].batch
    got, want = ran(layout, batch)[kind], ran("one", batch)[kind]
    assert got.problems == []
    np.testing.assert_array_equal(np.array(got.columns(None)), np.array(want.columns(None)))
    assert_same(got, want)


def test_packed_conversations_have_the_loss_and_the_gradients_of_padded_ones() -> None:
    packed, padded = ran("one")["all packed"], ran("one")["all padded"]
    np.testing.assert_allclose(packed.losses, padded.losses, rtol=1e-6)
    np.testing.assert_allclose(packed.norms, padded.norms, rtol=1e-6)
    for name, gradient in padded.gradients.items():
        assert distance(packed.gradients[name], gradient) <= 1e-6, name


def test_ranks_and_micro_batches_have_uneven_numbers_of_learned_tokens() -> None:
    padded, packed = (samples(load_run_config([*SFT, kind])) for kind in KINDS.values())
    assert len(packed) < len(padded) / 1.5
    sums = [sample.loss_mask.sum() for sample in padded[:12]]
    pairs = np.add(sums[0::2], sums[1::2])
    assert pairs.max() >= 5 * pairs.min() > 0

"""Padding through a whole step: no layout counts it, and what it holds changes nothing."""

from functools import cache

import numpy as np
import pytest

from gpt4moe.config.load import load_run_config
from gpt4moe.proof.outcome import Outcome, assemble
from gpt4moe.proof.plan import Phase
from tests.distributed.case import BASE
from tests.distributed.layouts import LAYOUTS, LayoutCase
from tests.distributed.padding import padded_phases, real_lengths
from tests.distributed.runs import RATE
from tests.distributed.test_gradients import assert_same, distance
from tests.distributed.test_recompute import KINDS, PARTIAL
from tests.spawn import run_ranks

pytestmark = pytest.mark.layouts

# Drops and both losses pool over a micro-batch: each would feel a token that is none. Two layers on each of two stages,
# of which partial recompute keeps one.
OVERRIDES = (*BASE, "model.moe.router.capacity_factor=0.8")
SHOWN: dict[str, tuple[str, ...]] = {
    "one": ("none", PARTIAL),
    "pp2": ("none",),
    "dp2-ep2": ("none",),
    "tp2-pp2-ep2": ("none", *KINDS),
    "tp2-cp2-ep2-etp2": (PARTIAL,),
}
"""The kinds of recompute on each layout."""


@cache
def ran(layout: str, fill: int) -> dict[str, Outcome]:
    """Every kind of recompute that is shown on a layout."""
    case = LAYOUTS.get(layout, LayoutCase(1, ()))
    phases = [
        Phase(run=load_run_config([*OVERRIDES, *case.overrides, *KINDS.get(kind, ())]), steps=2, descent=RATE)
        for kind in SHOWN[layout]
    ]
    answers = run_ranks(case.world_size, padded_phases, phases, fill)
    return {kind: assemble([answer[at] for answer in answers]) for at, kind in enumerate(SHOWN[layout])}


def test_one_process_counts_no_padding_and_what_it_holds_changes_nothing() -> None:
    got, want = ran("one", 0)["none"], ran("one", 7)["none"]
    assert got.losses == want.losses and got.norms == want.norms
    np.testing.assert_array_equal(got.routing, want.routing)
    for name, gradient in want.gradients.items():
        assert distance(got.gradients[name], gradient) == 0, name
    run = load_run_config([*OVERRIDES])
    real = sum(sum(real_lengths(run, micro_batch)) for micro_batch in range(6))
    np.testing.assert_array_equal(np.array(want.columns(None)).sum(axis=-1), real * 2)
    assert all((dropped > 0).all() for dropped in want.columns(["dropped"])), "every layer must drop something"


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, kinds in SHOWN.items() for kind in kinds])
def test_a_padded_batch_is_on_a_layout_what_it_is_in_one_process(name: str, kind: str) -> None:
    got, want = ran(name, 0)[kind], ran("one", 0)["none"]
    assert got.problems == []
    np.testing.assert_array_equal(np.array(got.columns(None)), np.array(want.columns(None)))
    np.testing.assert_array_equal(np.array(got.columns(["dropped"])), np.array(want.columns(["dropped"])))
    assert_same(got, want)

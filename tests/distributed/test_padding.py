"""Padding through a whole step: no layout counts it, and what it holds changes nothing."""

import dataclasses
from functools import cache
from unittest.mock import patch

import numpy as np
import pytest
import torch

from gpt4moe.config.load import load_run_config
from gpt4moe.config.run import RunConfig
from gpt4moe.data.batch import Batch
from gpt4moe.parallel.environment import Environment
from gpt4moe.proof import ranks
from gpt4moe.proof.batches import synthetic_batches
from gpt4moe.proof.outcome import Outcome, RankAnswer, assemble
from gpt4moe.proof.phase import Phase
from tests.distributed.case import BASE
from tests.distributed.layouts import LAYOUTS, LayoutCase
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
    "tp2-pp2-ep2": ("none", *KINDS),
    "tp2-cp2-ep2-etp2": (PARTIAL,),
}
"""The kinds of recompute on each layout."""


def real_lengths(run: RunConfig, micro_batch: int) -> list[int]:
    """Of a micro-batch's sequences: all of it, a part, one token, none."""
    whole = run.model.seq_length
    return [(whole, 5, 1, 0, 9, whole)[(2 * micro_batch + row) % 6] for row in range(run.training.micro_batch_size)]


def padded(fill: int, run: RunConfig, step: int, dp: int, dp_index: int, tokens: int) -> list[Batch]:
    """synthetic_batches whose sequences end early; what stands after their end is `fill`."""
    return [
        _cut(batch, real_lengths(run, dp_index + at * dp), fill)
        for at, batch in enumerate(synthetic_batches(run, step, dp, dp_index, tokens))
    ]


def _cut(batch: Batch, lengths: list[int], fill: int) -> Batch:
    none = torch.arange(batch.tokens.shape[1]) >= torch.tensor(lengths).unsqueeze(1)
    assert batch.token_ids is not None
    return dataclasses.replace(
        batch, tokens=batch.tokens.masked_fill(none, fill), labels=batch.labels.masked_fill(none, fill),
        loss_mask=batch.loss_mask.masked_fill(none, 0.0), token_ids=batch.token_ids.masked_fill(none, -1),
    )  # fmt: skip


def padded_phases(environment: Environment, phases: list[Phase], fill: int) -> list[RankAnswer]:
    with patch.object(ranks, "synthetic_batches", lambda *given: padded(fill, *given)):
        return ranks.run_phases(environment, phases)


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

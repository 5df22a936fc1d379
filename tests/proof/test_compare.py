"""What is not a number is a difference, wherever it stands; and JSON stays JSON."""

import dataclasses
import json
from collections.abc import Callable
from math import inf, nan
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gpt4moe.config.load import load_run_config
from gpt4moe.parallel.layout import Layout
from gpt4moe.proof import plan
from gpt4moe.proof.compare import DESCENT, distance, tensor_differences
from gpt4moe.proof.outcome import GRADIENT, WEIGHT, Outcome
from gpt4moe.proof.proof_report import as_data
from gpt4moe.proof.prove import judge
from gpt4moe.proof.round_off import turned_by_round_off
from gpt4moe.proof.shrink import Shrunk
from tests.distributed.case import BASE
from tests.proof.test_faults import one_process

pytestmark = pytest.mark.layouts

OUTPUT = "output_layer.weight"
Spoil = Callable[[Outcome, float], Outcome]


def auxiliary_loss(outcome: Outcome, value: float) -> Outcome:
    """Of the second step alone."""
    routing = [table.copy() for table in outcome.routing]
    routing[1][2, outcome.extras.index("z_loss") - len(outcome.extras)] = value
    return dataclasses.replace(outcome, routing=routing)


def load(outcome: Outcome, value: float) -> Outcome:
    routing = [table.copy() for table in outcome.routing]
    routing[2][0, 0] = value
    return dataclasses.replace(outcome, routing=routing)


def last(numbers: str) -> Spoil:
    return lambda outcome, value: dataclasses.replace(outcome, **{numbers: [*getattr(outcome, numbers)[:-1], value]})


def element(kind: str) -> Spoil:
    def spoil(outcome: Outcome, value: float) -> Outcome:
        tensor = outcome.tensors[kind][OUTPUT].copy()
        tensor[3, 5] = value
        return dataclasses.replace(outcome, tensors=outcome.tensors | {kind: outcome.tensors[kind] | {OUTPUT: tensor}})

    return spoil


PLACES: dict[str, Spoil] = {
    "auxiliary loss": auxiliary_loss, "load": load, "loss": last("losses"), "norm": last("norms"),
    "gradient": element(GRADIENT), "weight": element(WEIGHT),
}  # fmt: skip


@pytest.mark.parametrize("sides", ["the layout", "both"])
@pytest.mark.parametrize("value", [nan, inf])
@pytest.mark.parametrize("place", PLACES)
def test_what_is_not_finite_is_a_difference_also_where_one_process_has_it_too(
    place: str, value: float, sides: str
) -> None:
    run = load_run_config([*BASE])
    layout = Layout.from_config(run.parallel, 1)
    spoilt = one_process() | {plan.DESCENT: PLACES[place](one_process()[plan.DESCENT], value)}
    want = spoilt if sides == "both" else one_process()
    proof = judge(Shrunk(asked=run, asked_layout=layout, run=run, layout=layout), spoilt, want, 0.0)
    assert not proof.is_equal
    assert place in ("auxiliary loss", "load", "weight") or proof.suspects[0].startswith("not finite")
    different = [item for item in (*proof.tensors[plan.DESCENT], *proof.numbers[plan.DESCENT]) if item.is_different]
    assert [item.relative for item in different] == [inf], "and nothing else is"
    found = json.loads(json.dumps(as_data([proof]), allow_nan=False))
    assert [item["relative"] for key in ("families", "numbers") for item in found["meshes"][0][key]
            if not item["equal"]] == [None]  # fmt: skip


@pytest.mark.parametrize("name", ["dropped", "entropy", "margin", "load_balancing_loss", "z_loss"])
def test_every_number_of_the_routing_counts(name: str) -> None:
    run, want = load_run_config([*BASE]), one_process()
    layout, routing = Layout.from_config(run.parallel, 1), [table.copy() for table in want[plan.DESCENT].routing]
    routing[1][2, want[plan.DESCENT].extras.index(name) - len(want[plan.DESCENT].extras)] *= 1.01
    routing[1][2, want[plan.DESCENT].extras.index(name) - len(want[plan.DESCENT].extras)] += name == "dropped"
    spoilt = want | {plan.DESCENT: dataclasses.replace(want[plan.DESCENT], routing=routing)}
    proof = judge(Shrunk(asked=run, asked_layout=layout, run=run, layout=layout), spoilt, want, 0.0)
    assert [item.first_step for item in proof.numbers[plan.DESCENT] if item.is_different] == [2]


def test_a_margin_that_is_no_number_excuses_nothing() -> None:
    want = dataclasses.replace(one_process()[plan.DESCENT], margins=[nan] * plan.STEPS)
    moved = [table.copy() for table in want.routing]
    moved[0][0, :2] += 1, -1
    assert turned_by_round_off(dataclasses.replace(want, routing=moved), want) is None


def test_a_distance_is_infinite_where_anything_is_not_finite() -> None:
    one = np.ones(3)
    for ours, reference in ((one * nan, one), (one, one * nan), (one * inf, one * inf), (one, one * inf)):
        assert distance(ours, reference, 1e9) == inf
    assert distance(one, one) == 0


GATE, MATRIX = (
    "decoder.layers.0.gated_cross_attention.mlp_gate",
    "decoder.layers.0.gated_cross_attention.linear_q.weight",
)


@pytest.mark.parametrize(
    ("kind", "gate", "moved", "is_different"),
    [
        (GRADIENT, 8e-3, 2e-7, False),  # round-off of a sum whose terms cancel: more than 1e-5 of the sum
        (GRADIENT, 8e-3, 8e-6, True),  # a factor of 1.001
        (WEIGHT, 5e-1, 2e-5, True),  # no sum: held as every weight
    ],
)
def test_a_gate_s_gradient_may_be_off_by_round_off_of_its_terms_and_a_wrong_factor_shows(
    kind: str, gate: float, moved: float, is_different: bool
) -> None:
    matrix = np.full((10, 10), 0.1, dtype=np.float32)  # of norm 1
    sides: list[Any] = [
        SimpleNamespace(tensors={kind: {MATRIX: matrix, GATE: np.array([value], dtype=np.float64)}})
        for value in (gate + moved, gate)
    ]
    (found,) = (item for item in tensor_differences(*sides, {kind: DESCENT[kind]}) if item.name == GATE)
    assert found.is_different == is_different

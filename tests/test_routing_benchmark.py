"""benchmarks/routing.py: planned rows and bytes are what two ranks send; bad input ends it before it measures."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from benchmarks import routing
from benchmarks.routing_ranks import Seen, Steps, measure
from benchmarks.routing_workloads import WORKLOADS, Sizes
from gpt4moe.moe.dispatch import Dispatcher
from gpt4moe.moe.plan import Plan
from gpt4moe.parallel.environment import Environment
from gpt4moe.planner.communication import RoutedRows
from gpt4moe.planner.routed import Heat, computed_rows, heat, rows_of_ranks
from gpt4moe.runlog.routing_record import RecordedRouting, RoutingLog
from tests.spawn import run_ranks

SIZES, STEPS = Sizes(num_tokens=64, num_experts=8, top_k=2), 2
OVERRIDES = routing.run_overrides(SIZES, 2, hidden_size=16, ffn_hidden_size=16)
RECORDED = [
    RecordedRouting(
        step=step, layer=layer, top_k=2, tokens=[[32 - 3 * step, 9, 0, 5 + layer, 0, 2, 16 - layer, 3 * step]] * 2
    )
    for step in (5, 10)
    for layer in (0, 1)
]
Rows = list[tuple[int, int, int]]
"""Sent to the other rank, received from it, computed: of every plan of the layer's passes."""


def ranks_rows(environment: Environment, workloads: dict[str, Steps]) -> tuple[dict[str, dict[str, Seen]], Rows]:
    """What the benchmark saw on a rank, and what its dispatchers planned; the layer's passes come first."""
    rows: Rows = []
    original = Dispatcher.plan

    def plan(self: Dispatcher, *given: Any) -> Plan:
        made = original(self, *given)
        own, (sent, received) = environment.rank, made.splits
        rows.append((sum(sent) - sent[own], sum(received) - received[own], int(made.arriving.sum())))
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Dispatcher, "plan", plan)
        return measure(environment, OVERRIDES, workloads, 0, False), rows


@cache
def answers() -> tuple[dict[str, Steps], list[tuple[dict[str, dict[str, Seen]], Rows]]]:
    workloads = routing.all_workloads(SIZES, STEPS, RECORDED)
    return workloads, run_ranks(2, ranks_rows, workloads)


@pytest.mark.parametrize("subject", ["layer", "step"])
def test_planned_bytes_are_what_each_rank_sends_under_every_workload(subject: str) -> None:
    workloads, found = answers()
    rows = routing.table_rows(subject, OVERRIDES, workloads, [seen for seen, _ in found])
    assert set(rows) == {*WORKLOADS, routing.RECORDED}
    for name, row in rows.items():
        assert [seen.bytes_sent for seen in row.ranks] == row.plan.bytes_sent, name
        assert len(row.plan.bytes_sent[0]) == len(workloads[name]) and min(row.plan.bytes_sent[0]) > 0
    ragged = rows["W4_source_ragged"]
    assert ragged.plan.multiple < 1 < rows["W2_hot_rank"].plan.multiple and ragged.exact
    ragged.ranks[0].bytes_sent[0] += 4
    assert not ragged.exact
    ragged.ranks[0].bytes_sent[0] -= 4


def test_planned_rows_are_what_each_rank_sends_receives_and_computes() -> None:
    workloads, found = answers()
    steps = [step[0].counts(SIZES.num_experts, 2) for of_workload in workloads.values() for step in of_workload]
    for rank, (_, rows) in enumerate(found):
        planned = [(it.sent, it.received) for it in (rows_of_ranks(counts)[rank] for counts in steps)]
        assert [row[:2] for row in rows[: len(steps)]] == planned
        assert [row[2] for row in rows[: len(steps)]] == [computed_rows(counts)[rank] for counts in steps]


def test_rows_and_heat_of_a_routing() -> None:
    counts = [[4, 0, 1, 1], [2, 2, 0, 2]]
    assert rows_of_ranks(counts) == [RoutedRows(sent=2, received=4), RoutedRows(sent=4, received=2)]
    assert computed_rows(counts) == [8, 4]
    assert heat(counts) == Heat(rows=12, busiest_expert=2.0, busiest_rank=8 / 6)
    assert heat([[0, 0], [0, 0]]) == Heat(rows=0, busiest_expert=0.0, busiest_rank=0.0)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--ranks", "0"], "--ranks 0 is below 1"),
        (["--rounds", "0"], "--rounds 0 is below 1"),
        (["--ranks", "3"], "--ranks 3 does not divide 2048 tokens and 16 experts"),
        (["--trace", "nowhere"], "has no recorded step"),
        (["--trace", "{ramped}"], "have 2 sizes"),
        (["--trace", "{impossible}"], "no 2 distinct experts"),
    ],
)
def test_bad_input_is_refused_in_two_lines(
    arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, rows in (("ramped", [[2, 2], [4, 4]]), ("impossible", [[7, 1]])):
        (tmp_path / name).mkdir()
        RoutingLog(tmp_path / name, 0, 0).add(
            [
                {"step": n, "layer": 0, "rank": 0, "sources": 1, "top_k": 2, "tokens": row}
                for n, row in enumerate(rows, 1)
            ]
        )
    given = [argument.format(ramped=tmp_path / "ramped", impossible=tmp_path / "impossible") for argument in arguments]
    assert routing.main(given) == 2
    said = capsys.readouterr().err
    assert says in said and len(said.splitlines()) == 2

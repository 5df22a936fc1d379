"""The report of a run on several ranks shows the bytes of its first step; counting, and a record of the
routing, change no number."""

import json
from pathlib import Path

import pytest

from gpt4moe.config.load import load_run_config
from gpt4moe.parallel.layout import Layout
from gpt4moe.planner.communication import bytes_of_all_ranks
from gpt4moe.runlog.routing_record import ROUTING_FOLDER, read_routing
from gpt4moe.runlog.run_files import EXPERT_LOAD_FILE, WIRE_FILE
from tests.training.command import BATCH, SEQ, SMALL, metrics, train

LAYOUT = ("parallel.tp=2", "parallel.ep=2", "training.steps=2")


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "counted"
    assert [rank.status for rank in train(folder, *LAYOUT, ranks=2)] == [0, 0]
    return folder


def test_the_first_step_is_counted_and_the_report_shows_it(counted: Path) -> None:
    stored = json.loads((counted / WIRE_FILE).read_text())
    assert (stored["step"], stored["ranks"]) == (1, 2)
    run = load_run_config([*SMALL, *LAYOUT, "run.name=counted"])
    formula = bytes_of_all_ranks(run, Layout.from_config(run.parallel, 2))
    for kind in ("all_gather", "reduce_scatter"):
        assert stored["sent"]["tp"][kind] == formula["tp"][kind]
    # Two steps or an evaluation would be twice that; a router is not even.
    assert stored["sent"]["ep"]["all_to_all"] == pytest.approx(formula["ep"]["all_to_all"], rel=0.5)
    page = (counted / "report.html").read_text()
    assert "Bytes on the wire" in page and f"<td>{formula['tp']['all_gather'] / 1e3:.4g} kB</td>" in page


@pytest.fixture(scope="module")
def not_counted(counted: Path) -> Path:
    folder = counted.parent / "not_counted"
    assert train(folder, *LAYOUT, "tracking.count_bytes=false", "training.record_routing=1", ranks=2)[0].status == 0
    return folder


def test_counting_changes_no_number_and_can_be_off(counted: Path, not_counted: Path) -> None:
    assert metrics(not_counted) == metrics(counted)
    assert not (not_counted / WIRE_FILE).exists()
    assert "Bytes on the wire" not in (not_counted / "report.html").read_text()


def test_recorded_routing_is_what_the_run_counted_and_changes_no_number(counted: Path, not_counted: Path) -> None:
    """Also of the last step, behind which held-out samples were routed."""
    assert metrics(not_counted) == metrics(counted) and not (counted / ROUTING_FOLDER).exists()
    recorded = read_routing(not_counted)
    assert [(it.step, it.layer) for it in recorded] == [(1, 0), (1, 1), (2, 0), (2, 1)]
    # Two tensor-parallel ranks, each with half of every sequence.
    assert {(len(it.tokens), sum(row)) for it in recorded for row in it.tokens} == {(2, BATCH * SEQ // 2 * 2)}
    load = json.loads((not_counted / EXPERT_LOAD_FILE).read_text())
    for layer in (0, 1):
        rows = [row for it in recorded if it.layer == layer for row in it.tokens]
        assert [sum(column) for column in zip(*rows, strict=True)] == load["tokens"][layer]
    for record in metrics(not_counted):
        for it in recorded:
            if it.step == record["step"]:
                tokens = [sum(column) for column in zip(*it.tokens, strict=True)]
                busiest = record[f"expert_load_max_over_mean/layer_{it.layer}"]
                assert busiest == pytest.approx(max(tokens) * len(tokens) / sum(tokens))

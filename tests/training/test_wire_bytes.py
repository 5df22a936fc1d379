"""The report of a run on several ranks shows the bytes of its first step; counting changes no number."""

import json
from pathlib import Path

import pytest

from gpt4moe.config.load import load_run_config
from gpt4moe.parallel.layout import Layout
from gpt4moe.planner.communication import bytes_of_all_ranks
from gpt4moe.runlog.run_files import WIRE_FILE
from tests.training.command import SMALL, metrics, train

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


def test_counting_changes_no_number_and_can_be_off(counted: Path) -> None:
    folder = counted.parent / "not_counted"
    assert train(folder, *LAYOUT, "tracking.count_bytes=false", ranks=2)[0].status == 0
    assert metrics(folder) == metrics(counted)
    assert not (folder / WIRE_FILE).exists() and "Bytes on the wire" not in (folder / "report.html").read_text()

"""report.html in headless Chromium: charts drawn, values under the pointer, no console error, no request."""

import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from gpt4moe.config.load import load_run_config
from gpt4moe.pages.report import ReportData, RunStart, Sample, write_report
from gpt4moe.planner.pipeline_plan import run_pipeline
from gpt4moe.runlog.dashboard import DASHBOARD_FILE, read_dashboard
from gpt4moe.runlog.expert_load import LoadWindow
from gpt4moe.runlog.metrics import Parts, Record
from gpt4moe.runlog.metrics_columns import MetricColumns
from gpt4moe.runlog.metrics_table import METRICS
from tests.browser import Browser, find_program
from tests.runlog.synthetic import falling_loss, uneven_load

STEPS = 400
PARTS = {
    Parts.sources: ("code", "prose"), Parts.layers: ("layers_0_1", "layers_2_3"), Parts.tasks: ("sums/accuracy",),
    Parts.none: (),
}  # fmt: skip
# Of every chart: its title, and of each of its curves the length in pixels and whether it lies within the chart.
CHARTS = """[...document.querySelectorAll("[data-chart]")].map(figure => {
  const svg = figure.querySelector("svg").getBoundingClientRect();
  const title = figure.querySelector("h3").firstChild.textContent.trim();
  return [title, [...figure.querySelectorAll("polyline")].map(curve => {
    const box = curve.getBoundingClientRect();
    const inside = box.left >= svg.left && box.right <= svg.right && box.top >= svg.top && box.bottom <= svg.bottom;
    return [curve.getTotalLength(), inside, getComputedStyle(curve).stroke];
  })];
})"""


def program() -> str:
    found = find_program()
    if found is None:
        pytest.skip("no Chromium: apt-get install chromium (Debian), or Google Chrome; or set CHROMIUM")
    return found


def records() -> list[Record]:
    """Every metric of the table and parts of those that have them."""
    made = falling_loss(STEPS)
    for record in made:
        for name, metric in METRICS.items():
            if name != "eval_loss" or name in record:
                value = record.setdefault(name, 1.0 + record["step"] / STEPS)
                record.update({f"{name}/{part}": value for part in PARTS[metric.parts]})
    return made


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("page") / "report.html"
    windows = [LoadWindow(50 * i + 1, 50 * i + 50, np.array([[3.0, 1, i], [0, 1, 2]])) for i in range(5)]
    run = load_run_config(["+experiment=tiny", "run.name=test", "parallel.pp=2"])
    data = ReportData(
        run_name="tiny", layout="pp=2, 2 ranks", resolved_config="run:\n  name: tiny\n",
        columns=MetricColumns(records()),
        checkpoint_path="runs/tiny/checkpoints/x", expert_load=uneven_load(num_experts=8), load_windows=windows,
        starts=[RunStart(first_step=1, when="10:00", layout="a"), RunStart(first_step=200, when="10:05", layout="b")],
        unigram_entropy=6.0, alerts=[(7, "loss spike", "loss: 9")], pipeline=run_pipeline(run),
        samples=[Sample(prompt="see", text=' <img src="http://127.0.0.1:9/a.png"> <script>boom()</script>')],
    )  # fmt: skip
    write_report(file, data)
    return file


@pytest.fixture(scope="module")
def browser(page: Path) -> Iterator[Browser]:
    with Browser(program()) as browser:
        browser.open(page)
        yield browser


def test_every_panel_is_drawn_whole_and_in_colour(browser: Browser) -> None:
    charts = dict(browser.evaluate(CHARTS))
    assert list(charts) == [panel.title for section in read_dashboard().sections for panel in section.panels]
    for title, curves in charts.items():
        assert curves, title
        for length, is_inside, colour in curves:
            assert length > 100 and is_inside and colour.startswith("rgb"), (title, length, is_inside, colour)
    for title in ("Loss of each source", "Router entropy, by layers"):
        assert len({colour for _, _, colour in charts[title]}) == 2, "two curves of one colour"


def test_heat_maps_and_the_schedule_are_drawn(browser: Browser) -> None:
    cells = browser.evaluate(
        """["rect.over", "rect.dead"].map(
            it => [...document.querySelectorAll(it)].map(cell => cell.getBoundingClientRect().height))"""
    )
    assert [len(heights) for heights in cells] == [2, 1]  # expert 0 of both layers is above the mean
    assert all(min(heights) > 10 for heights in cells)
    strokes = browser.evaluate('[...document.querySelectorAll(".map path.dead")].map(it => it.getTotalLength())')
    assert len(strokes) == 5 and min(strokes) > 0, "each of the five windows has a dead expert"
    assert browser.evaluate('document.body.innerText.includes("Pipeline schedule")')


def test_the_pointer_shows_the_step_and_its_values(browser: Browser) -> None:
    browser.evaluate('(document.querySelector("[data-chart] svg").scrollIntoView({block: "center"}), 0)')
    place = 'document.querySelector("[data-chart] svg").getBoundingClientRect()'
    x, y = browser.evaluate(f"(box => [box.left + box.width / 2, box.top + box.height / 2])({place})")
    browser.move_pointer(x, y)
    tip = browser.evaluate('document.querySelector("[data-chart] .tip").innerText')
    step = int(tip.splitlines()[0].removeprefix("step "))
    assert abs(step - STEPS / 2) < STEPS / 10
    assert f"{records()[step - 1]['loss']:.5g}" in tip
    browser.move_pointer(1, 1)
    assert browser.evaluate('document.querySelector("[data-chart] .tip").hidden')


def test_nothing_is_asked_of_the_network_and_nothing_is_wrong(browser: Browser, page: Path) -> None:
    assert browser.requests == [page.as_uri()]
    assert browser.errors == []


def test_a_phone_at_night_gets_a_dark_page_that_fits(page: Path) -> None:
    with Browser(program(), width=390, dark=True) as browser:
        browser.open(page)
        assert browser.evaluate("document.documentElement.scrollWidth") <= 390
        red, green, blue = browser.evaluate(
            "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)"
        )
        assert max(red, green, blue) < 50


def test_a_planted_error_and_a_planted_request_are_noticed(tmp_path: Path) -> None:
    planted = tmp_path / "planted.html"
    planted.write_text('<img src="http://127.0.0.1:1/a.png"><script>console.error("here"); nothing.there</script>')
    with Browser(program()) as browser:
        browser.open(planted)
        assert browser.requests == [planted.as_uri(), "http://127.0.0.1:1/a.png"]
        assert any("here" in error for error in browser.errors)
        assert any("nothing is not defined" in error for error in browser.errors)


def test_the_tool_makes_pictures_or_refuses(page: Path, tmp_path: Path) -> None:
    chromium = {"CHROMIUM": program()}
    made = tool(str(page), "--out", str(tmp_path), **chromium)
    assert made.returncode == 0, made.stderr
    for name in ("report.png", "report-experts.png"):
        picture = (tmp_path / name).read_bytes()
        width, height = struct.unpack(">II", picture[16:24])  # of PNG's first chunk
        assert picture.startswith(b"\x89PNG") and width == 1120 and 300 < height <= 1100
    refused = tool(str(tmp_path / "none.html"), "--out", str(tmp_path), **chromium)
    assert refused.returncode == 2 and "none.html is not there" in refused.stderr


def tool(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/screenshots.py", *arguments]
    return subprocess.run(
        command, cwd=DASHBOARD_FILE.parents[1], env=os.environ | variables, capture_output=True, text=True
    )

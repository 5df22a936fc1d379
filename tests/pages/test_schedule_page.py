"""The Gantt chart and the page of a pipeline's schedule: every slot is drawn, once, where it ran."""

import json
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest

from gpt4moe.config.load import load_run_config
from gpt4moe.pages.schedule_page import MAX_BARS, gantt, schedule_json, schedule_section, schedule_text
from gpt4moe.pipeline.schedule import schedule, simulate
from gpt4moe.planner.pipeline_plan import PipelinePlan, run_pipeline

ROOT = Path(__file__).resolve().parents[2]
SVG = "{http://www.w3.org/2000/svg}"


def drawn(**degrees: int) -> ElementTree.Element:
    return ElementTree.fromstring(gantt(simulate(schedule(**degrees)), label="a < b", unit="seconds"))


def tiny(*overrides: str) -> PipelinePlan:
    return run_pipeline(load_run_config(["+experiment=tiny", "run.name=test", *overrides]))


def test_every_slot_is_a_bar_with_its_own_words() -> None:
    bars = [rect for rect in drawn(pp=4, vpp=2, micro_batches=8).iter(f"{SVG}rect") if rect.get("class") != "rail"]
    words = [title.text or "" for rect in bars for title in rect.iter(f"{SVG}title")]
    assert len(words) == len(set(words)) == 4 * 2 * 8 * 2
    assert "rank 3: backward of micro-batch 7, chunk 1, from " in " ".join(words)


def test_bars_of_a_rank_do_not_overlap_and_stay_inside_the_picture() -> None:
    rows: dict[str, list[tuple[float, float]]] = {}
    for rect in drawn(pp=3, micro_batches=5).iter(f"{SVG}rect"):
        if rect.get("class") != "rail":
            x, width = float(rect.get("x") or 0), float(rect.get("width") or 0)
            rows.setdefault(rect.get("y") or "", []).append((x, x + width))
    assert len(rows) == 3
    for spans in rows.values():
        spans.sort()
        assert spans[0][0] >= 64 and spans[-1][1] <= 1100
        assert all(left[1] <= right[0] for left, right in pairwise(spans))


def test_a_large_schedule_is_drawn_whole_in_few_bytes() -> None:
    degrees = {"pp": 16, "vpp": 4, "micro_batches": 64}
    slots = 16 * 4 * 64 * 2
    assert slots > MAX_BARS
    text = gantt(simulate(schedule(**degrees)), label="large", unit="seconds")
    assert sum(path.count("M") for path in re.findall(r' d="([^"]*)"', text)) == slots
    assert len(text) < 40 * slots


def test_the_picture_is_the_same_every_time_and_needs_nothing_else() -> None:
    timeline = simulate(schedule(pp=2, micro_batches=4))
    text = gantt(timeline, label="a < b", unit="seconds")
    assert text == gantt(timeline, label="a < b", unit="seconds")
    assert not re.search(r"<script|href|url\(|@import|<image", text)
    assert ElementTree.fromstring(text).get("aria-label") == "a < b"


def test_the_section_shows_idle_time_and_live_activations() -> None:
    plan = tiny("parallel.pp=4")
    section = schedule_section(plan)
    assert f"idle {plan.bubble_share:.1%}" in section
    cells = re.findall(r"<tr><td>0</td><td>0</td><td>([\d.]+)%</td><td>(\d+)</td><td>(\d+)</td></tr>", section)
    assert cells == [(f"{100 * (1 - plan.timeline.busy[0] / plan.timeline.total):.1f}", "4", "4")]


def test_text_and_json_tell_the_same_slots() -> None:
    plan = tiny("parallel.pp=2", "parallel.vpp=2")
    rows = [line.split()[2:] for line in schedule_text(plan).splitlines()[2:4]]
    slots = json.loads(schedule_json(plan))["slots"]
    for rank, row in enumerate(rows):
        mine = [slot for slot in slots if slot["rank"] == rank]
        assert row == [f"{slot['pass'][0].upper()}{slot['chunk']}.{slot['micro_batch']}" for slot in mine]


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["parallel.pp=4", "ranks=8", "output=json"], 0, '"micro_batches": 8'),
        (["parallel.pp=2", "parallel.vpp=2", "training.global_batch_size=3"], 2, "parallel.pp=2"),
        (["output=xml"], 2, "output=text|json|svg"),
        (["parallel.pq=2"], 2, "Unknown key parallel.pq"),
    ],
)
def test_the_command_answers_or_refuses_without_a_traceback(arguments: list[str], status: int, words: str) -> None:
    command = [sys.executable, "tools/show_schedule.py", "+experiment=tiny", "training.micro_batch_size=1", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    assert words in (done.stderr if status else done.stdout)
    assert "Traceback" not in done.stderr
    if status == 0:
        assert json.loads(done.stdout)["message_problems"] == []

"""Training tells alerts while it runs: on the console, as events, in the report; also when no step ends any more."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from tests.training.command import Event, train

ALERTS = [
    {"name": "always", "metric": "loss", "rule": "stays_above", "limit": 0, "steps": 3},
    {"name": "never", "metric": "loss", "rule": "stays_above", "limit": 100, "steps": 2},
    {"name": "halted", "metric": "step_seconds", "rule": "stalled", "times": 1.5, "seconds": 2},
]


def told(folder: Path) -> list[dict[str, Any]]:
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [event for event in events if event["event"] == "alert"]


def test_alerts_are_told_when_they_begin_and_when_no_step_ends(tmp_path: Path) -> None:
    dashboard, folder, go = tmp_path / "d.yaml", tmp_path / "x", tmp_path / "go"
    dashboard.write_text(yaml.safe_dump({"sections": [], "alerts": ALERTS}))
    # The second rank halts after step 4, so the first one waits for it in step 5, until it has told that.
    halt = Event(after_step=4, rank=1, go=go)

    def is_told() -> bool:
        return (folder / "events.jsonl").exists() and any(event["name"] == "halted" for event in told(folder))

    with ThreadPoolExecutor() as pool:
        running = pool.submit(
            train, folder, "training.steps=6", "parallel.pp=2", f"tracking.dashboard={dashboard}", ranks=2,
            events=(halt,),
        )  # fmt: skip
        while not running.done() and not is_told():
            time.sleep(0.05)
        go.touch()
        ended = running.result()
    assert [it.status for it in ended] == [0, 0], ended[0].err
    assert [(event["name"], event["step"]) for event in told(folder)] == [("always", 3), ("halted", 4)]
    for text in ("alert after step 3: always: loss: ", "alert after step 4: halted: step_seconds: no step for 0:00:0"):
        assert text in ended[0].out and text not in ended[1].out
    page = (folder / "report.html").read_text()
    assert "<h2>Alerts</h2>" in page and "<td>halted</td>" in page


def test_a_wrong_dashboard_ends_with_2_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "d.yaml").write_text("sections: []\nalerts: [{name: x, metric: los, rule: plateau, steps: 10}]\n")
    (ended,) = train(tmp_path / "x", f"tracking.dashboard={tmp_path / 'd.yaml'}")
    assert ended.status == 2 and "alerts[0] ('x').metric is 'los'" in ended.err
    assert not (tmp_path / "x").exists()

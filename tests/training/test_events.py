"""events.jsonl of real runs: a kill, a resume and an error are told, and every second is accounted for."""

import signal
import time
from pathlib import Path

import pytest

from gpt4moe.runlog.events_log import read_events
from gpt4moe.runlog.goodput import goodput
from gpt4moe.runlog.metrics_log import read_metrics
from tests.training.command import Event, metrics, train

TEN = ("training.steps=10", "checkpoint.every=5", "checkpoint.keep=0", "training.check_replicas_every=5")


def test_a_killed_and_resumed_run_accounts_for_every_second(tmp_path: Path, whole_run: Path) -> None:
    folder, began = tmp_path / "x", time.time()
    with pytest.raises(AssertionError, match="died"):
        train(folder, *TEN, events=(Event(after_step=7, sent=signal.SIGKILL),))
    first_start = read_events(folder / "events.jsonl")
    assert [event["event"] for event in first_start] == [
        "start", "first_step", "pause", "replica_check", "pause", "checkpoint",
    ]  # fmt: skip
    killed = (folder / "metrics.jsonl").stat().st_mtime
    lost = [record["step_seconds"] for record in metrics(folder, timings=True)[5:]]
    with (folder / "events.jsonl").open("ab") as file:
        file.write(b'{"event": "che')
    (ended,) = train(folder, *TEN)
    assert ended.status == 0, ended.err

    events = read_events(folder / "events.jsonl")
    assert events[:6] == first_start, "lines are only added"
    pauses = ["evaluation", "replica_check", "checkpoint", "report"]
    kinds = ["start", "first_step", *pauses, *["pause"] * 4, "stop"]
    assert sorted(event["event"] for event in events[6:]) == sorted(kinds)
    assert {event["what"] for event in events[6:] if event["event"] == "pause"} == set(pauses)
    start, stop = events[6], events[-1]
    assert (start["resumed_step"], start["redone_steps"], start["last_sign_of_life"]) == (5, 2, killed)
    assert start["redone_seconds"] == sum(lost)
    assert (stop["event"], stop["reason"], stop["step"]) == ("stop", "finished", 10)
    assert metrics(folder) == metrics(whole_run)

    found = goodput(events, read_metrics(folder / "metrics.jsonl"), last_sign_of_life=0.0)
    assert found is not None
    # A process's start is told in clock ticks of 10 ms.
    assert began - 0.02 <= first_start[0]["time"] and stop["time"] <= time.time()
    assert sum(found.seconds.values()) == pytest.approx(stop["time"] - first_start[0]["time"], abs=1e-6)
    productive = sum(record["step_seconds"] for record in metrics(folder, timings=True))
    assert found.seconds["productive"] == pytest.approx(productive)
    assert found.seconds["redone"] == pytest.approx(sum(lost))
    assert min(found.seconds.values()) >= 0.0, found.seconds
    assert "Where the time went" in (folder / "report.html").read_text()
    assert [(attempt.end, attempt.last_step) for attempt in found.attempts] == [("killed", 7), ("finished", 10)]


def test_a_stop_has_its_reason(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    assert train(folder, *TEN, events=(Event(after_step=1, sent=signal.SIGTERM),))[0].status == 85
    ended = train(folder, *TEN, "optimizer.lr=1e30", "parallel.tp=2", ranks=2)
    assert [rank.status for rank in ended] == [1, 1]
    stops = [event for event in read_events(folder / "events.jsonl") if event["event"] == "stop"]
    assert [(stop["reason"], stop["step"]) for stop in stops] == [("SIGTERM", 2), ("DivergenceError", 3)]
    assert "nan" in stops[1]["cause"]


def test_an_events_file_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    (folder / "events.jsonl").mkdir(parents=True)
    (ended,) = train(folder, "training.steps=1")
    assert (ended.status, ended.err) == (0, "")
    assert "no more events, training goes on" in ended.out
    assert len(metrics(folder)) == 1

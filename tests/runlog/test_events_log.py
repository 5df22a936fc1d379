"""events.jsonl: lines are only added, a torn one is mended, and no disk stops a run."""

import json
import logging
import os
from pathlib import Path

import pytest

from gpt4moe.runlog.events_log import (
    EventsLog,
    before_start,
    last_seen,
    last_sign_of_life,
    own_events,
    read_events,
    scan_events,
)
from gpt4moe.runlog.metrics import Record


def write(path: Path, *kinds: str) -> None:
    with EventsLog(path) as log:
        for step, kind in enumerate(kinds, start=1):
            more = {"reason": "finished", "is_error": False} if kind == "stop" else {"seconds": 0.1}
            log.write(kind, step=step, **more)


def test_a_file_cut_at_any_byte_loses_its_torn_line_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    write(path, "first_step", "checkpoint", "evaluation")
    data = path.read_bytes()
    for cut in range(len(data) + 1):
        path.write_bytes(data[:cut])
        whole = data[:cut].count(b"\n")
        # A line that lacks its newline alone may be read, but the next start cannot tell it from a torn number.
        assert len(read_events(path)) in (whole, whole + 1)
        write(path, "stop")
        assert [event["event"] for event in read_events(path)] == [
            *["first_step", "checkpoint", "evaluation"][:whole], "stop",
        ]  # fmt: skip
        assert path.read_bytes().startswith(b"".join(data.splitlines(keepends=True)[:whole]))


def test_a_foreign_line_is_left_out_and_named(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    step = {"event": "first_step", "time": 1, "step": 1, "seconds": 2.0}
    lines = [
        b"\0\0",
        b"[1]",
        b'{"event": "dance", "time": 1}',
        b'{"event": "stop"}',
        json.dumps(step).encode(),
        b'{"ev',
    ]
    path.write_bytes(b"\n".join(lines))
    events, wrong = scan_events(path)
    assert events == read_events(path) == [step]
    assert wrong == [
        "events.jsonl line 1 is no JSON", "events.jsonl line 2 is no event", "events.jsonl line 3 is no event",
        "events.jsonl line 4 is a stop without is_error, reason, step, time",
    ]  # fmt: skip


def test_a_full_disk_is_one_warning_and_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log = EventsLog(tmp_path / "events.jsonl")
    real_write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: real_write(file, data[:5]))
    log.write("stop", step=1)
    log.write("stop", step=2)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "training goes on" in caplog.text


def test_a_folder_in_its_place_is_one_warning_and_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "events.jsonl").mkdir()
    log = EventsLog(tmp_path / "events.jsonl")
    log.write("stop", step=1)
    assert len(caplog.records) == 1


def test_a_start_finds_what_the_one_before_did_in_vain(tmp_path: Path) -> None:
    unknown = dict.fromkeys(("job", "submitted", "job_started", "last_sign_of_life"))
    numbers = dict.fromkeys(("ranks", "total_steps", "resumed_step", "redone_steps", "redone_seconds"), 0)
    with EventsLog(tmp_path / "events.jsonl") as log:
        log.write("start", at=100.0, run="a", layout="1 rank", **unknown, **numbers)
    records: list[Record] = [{"step": step, "step_seconds": 0.5} for step in (1, 2, 3, 4)]
    (tmp_path / "metrics.jsonl").touch()
    os.utime(tmp_path / "metrics.jsonl", (900.0, 900.0))
    told = [{"event": "hang", "time": 946.0}, {"event": "stop", "time": 948.0}]
    events = read_events(tmp_path / "events.jsonl")
    assert last_sign_of_life(tmp_path, events + told) == 900.0, "what tells of an end is written after it"
    assert last_seen(tmp_path, events + told) == 948.0
    found = before_start(tmp_path, events, "a", 2, records)
    assert found == {"last_sign_of_life": 900.0, "redone_steps": 2, "redone_seconds": 1.0}
    nothing = {"last_sign_of_life": None, "redone_steps": 0, "redone_seconds": 0.0}
    assert before_start(tmp_path, events, "copy", 2, records) == nothing, "a copy did not lose its parent's steps"
    assert before_start(tmp_path / "none", [], "a", 0, []) == nothing


def test_a_copy_under_a_new_name_owns_only_its_own_events() -> None:
    events = [
        {"event": "start", "run": "a"}, {"event": "stop"},
        {"event": "start", "run": "b"}, {"event": "first_step"}, {"event": "start", "run": "b"}, {"event": "stop"},
    ]  # fmt: skip
    assert own_events(events) == events[2:]
    assert own_events([]) == []

"""events.jsonl: lines are only added, a torn one is mended, and no disk stops a run."""

import json
import logging
import os
from pathlib import Path

import pytest

from gpt4moe.telemetry.events_log import EventsLog, before_start, own_events, read_events


def write(path: Path, *kinds: str) -> None:
    with EventsLog(path) as log:
        for step, kind in enumerate(kinds, start=1):
            log.write(kind, step=step, seconds=0.1)


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


def test_a_foreign_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'\0\0\n[1]\n{"event": "dance", "time": 1}\n{"event": "stop"}\n{"event": "stop", "time": 1}\n')
    assert read_events(path) == [{"event": "stop", "time": 1}]


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
    with EventsLog(tmp_path / "events.jsonl") as log:
        log.write("start", at=100.0, run="a")
    lines = [json.dumps({"step": step, "step_seconds": 0.5}) + "\n" for step in (1, 2, 3, 4)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    os.utime(tmp_path / "metrics.jsonl", (900.0, 900.0))
    assert before_start(tmp_path, "a", 2) == {"last_sign_of_life": 900.0, "redone_steps": 2, "redone_seconds": 1.0}
    nothing = {"last_sign_of_life": None, "redone_steps": 0, "redone_seconds": 0.0}
    assert before_start(tmp_path, "copy", 2) == nothing, "a copy did not lose its parent's steps"
    assert before_start(tmp_path / "none", "a", 0) == nothing


def test_a_copy_under_a_new_name_owns_only_its_own_events() -> None:
    events = [
        {"event": "start", "run": "a"}, {"event": "stop"},
        {"event": "start", "run": "b"}, {"event": "first_step"}, {"event": "start", "run": "b"}, {"event": "stop"},
    ]  # fmt: skip
    assert own_events(events) == events[2:]
    assert own_events([]) == []

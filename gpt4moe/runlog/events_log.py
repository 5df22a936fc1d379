"""events.jsonl: launches of a run, what training waited for, how it ended. Lines are only ever added.

    open (a torn last line is cut off) -> start -> first_step -> pause -> checkpoint -> pause -> evaluation ... -> stop
    kill -9 -> no stop: the next launch writes the time of the last sign of life -> start ...

metrics.jsonl has each step once; this file has what the run cost, and goodput.py adds it up. If a line cannot be
written, that is one warning and training goes on. A reader leaves out a line that is not as EVENTS says, and reports
which: a list of runs must survive any file.
"""

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from gpt4moe.runlog.metrics import Record
from gpt4moe.runlog.metrics_log import METRICS_FILE

logger = logging.getLogger(__name__)

EVENTS_FILE = "events.jsonl"
WENT_BACK = "went_back"
"""Reason of a stop after which the same process goes on, from an earlier checkpoint: the next event is a start."""

Event = dict[str, Any]
Check = Callable[[Any], bool]

_LATEST = 253_370_764_800.0
"""The year 9999, in seconds since 1970: the last that Python's dates can show."""


def _is_number(value: Any, most: float) -> bool:
    # Not `value <= most` alone: NaN compares with nothing.
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= most


def _time(value: Any) -> bool:
    return _is_number(value, _LATEST)


def _seconds(value: Any) -> bool:
    return _is_number(value, 1e10)


def _count(value: Any) -> bool:
    return isinstance(value, int) and _is_number(value, 1e15)


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _maybe(check: Check) -> Check:
    return lambda value: value is None or check(value)


@dataclass(frozen=True, kw_only=True, slots=True)
class EventKind:
    """One kind of event, and the checks of its fields."""

    meaning: str
    needs: Mapping[str, Check]
    """Besides `event` and `time` (seconds since 1970)."""
    may_have: Mapping[str, Check]


def _pause(meaning: str) -> EventKind:
    return EventKind(meaning=meaning, needs={"step": _count, "seconds": _seconds}, may_have={})


PAUSES: dict[str, EventKind] = {
    "checkpoint": _pause("training waited for a checkpoint (for the copy alone, where a thread writes it)"),
    "evaluation": _pause("training waited for the loss on held-out text, or for evaluation tasks"),
    "sampling": _pause("training waited for texts of training.sample_prompts"),
    "replica_check": _pause("training waited for the comparison of copies"),
    "recompute": _pause("a step was computed once more and compared (resilience.recompute_every)"),
    "report": _pause("loss.png and report.html were written"),
}
"""What training waits for. The event is written when the wait ends; `seconds` is its length."""

EVENTS: dict[str, EventKind] = {
    "start": EventKind(
        meaning="the process began; of Slurm: job, restart, submitted, job_started; of the launch "
        "before: last_sign_of_life, redone_steps, redone_seconds; written: when this line was written",
        needs={
            "run": _text, "job": _maybe(_count), "submitted": _maybe(_time), "job_started": _maybe(_time),
            "ranks": _count, "layout": _text, "total_steps": _count, "resumed_step": _count,
            "last_sign_of_life": _maybe(_time), "redone_steps": _count, "redone_seconds": _seconds,
        },
        may_have={"written": _time, "restart": _count},
    ),
    "first_step": EventKind(
        meaning="the first step of a launch is done", needs={"step": _count, "seconds": _seconds}, may_have={}
    ),
    "pause": EventKind(
        meaning="training begins to wait: for what, the name of the event that ends it",
        needs={"what": _text, "step": _count}, may_have={},
    ),
    **PAUSES,
    "alert": EventKind(
        meaning="an alert of configs/dashboard.yaml fired", needs={"step": _count, "name": _text, "text": _text},
        may_have={},
    ),
    "numbers": EventKind(
        meaning="a step's loss or gradient norm was not finite, or a spike; action: skip, or go_on",
        needs={"step": _count, "action": _text, "cause": _text}, may_have={},
    ),
    "go_back": EventKind(
        meaning="the run goes on from the checkpoint of to_step, without so many samples from there on, because of the "
        "numbers of step",
        needs={"step": _count, "to_step": _count, "samples": _count, "cause": _text}, may_have={},
    ),
    "hang": EventKind(
        meaning="nothing moved any more: who stopped, in what the others wait, the folder with the stacks of all ranks",
        needs={"step": _count, "cause": _text, "waiting": _text, "stacks": _text}, may_have={},
    ),
    "stop": EventKind(
        meaning="the launch ended and said so; reason: finished, a signal's name, went_back (the process goes on), or "
        "an error's class; cause in words, where it is known",
        needs={"step": _count, "reason": _text, "is_error": _flag}, may_have={"cause": _maybe(_text)},
    ),
}  # fmt: skip


def wrong_with(event: Any) -> str | None:
    """Why a decoded line is not a valid event; None when it is."""
    kind = event.get("event") if isinstance(event, dict) else None
    if not isinstance(kind, str) or kind not in EVENTS:
        return "is no event"
    lacking = sorted({"time", *EVENTS[kind].needs} - set(event))
    if lacking:
        return f"is a {kind} without {', '.join(lacking)}"
    checks = {"time": _time, **EVENTS[kind].needs, **EVENTS[kind].may_have}
    odd = [name for name, check in checks.items() if name in event and not check(event[name])]
    return f"is a {kind} whose {odd[0]} is {event[odd[0]]!r}"[:100] if odd else None


def read_events(path: Path) -> list[Event]:
    """All valid events, in order; without lines that a kill or a full disk has torn. Unreadable file: empty list."""
    return scan_events(path)[0]


def scan_events(path: Path) -> tuple[list[Event], list[str]]:
    """The valid events, in order, and what is wrong with the other lines. A torn last line is what a kill leaves, and
    is not reported."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return [], []
    except OSError as error:
        logger.warning("%s cannot be read: %s", path, error)
        return [], [f"{path.name} cannot be read: {error.strerror}"]
    events, wrong = [], []
    # Not splitlines(): it splits bytes at \r too.
    *lines, torn = data.split(b"\n")
    for number, line in enumerate([*lines, torn], start=1):
        event, why = _decoded(line)
        if event is not None:
            events.append(event)
        elif number <= len(lines):
            wrong.append(f"{path.name} line {number} {why}")
    return events, wrong


def shows_progress(event: Event) -> bool:
    """Whether the run went on until this line. A watchdog's alert and what tells of an end are written seconds after
    the last progress, and an alert of a step beside that step's line of metrics.jsonl."""
    return event["event"] not in ("alert", "hang", "stop")


def written_at(event: Event) -> float:
    """When an event was written. The `time` of a start is when its process began, seconds earlier."""
    return float(event["written"] if "written" in event else event["time"])


def own_events(events: list[Event]) -> list[Event]:
    """The events of the last run alone: a folder copied under a new name has the other run's events before its own."""
    starts = [index for index, event in enumerate(events) if event["event"] == "start"]
    first = len(events)
    for index in reversed(starts):
        if events[index]["run"] != events[starts[-1]]["run"]:
            break
        first = index
    return events[first:]


def before_start(
    run_folder: Path, events: list[Event], run_name: str, resumed_step: int, records: Sequence[Record]
) -> Event:
    """What the launch before one from `resumed_step` lost: its end and the steps to redo; nothing if there was none.

    Args:
        events, records: events.jsonl and metrics.jsonl as earlier launches left them.
    """
    fields: Event = {"last_sign_of_life": None, "redone_steps": 0, "redone_seconds": 0.0}
    events = own_events(events)
    if not events or events[0]["run"] != run_name:
        return fields
    redone = [record for record in records if record["step"] > resumed_step]
    fields["last_sign_of_life"] = last_sign_of_life(run_folder, events)
    fields["redone_steps"] = len(redone)
    fields["redone_seconds"] = sum(float(record.get("step_seconds", 0.0)) for record in redone)
    return fields


def last_sign_of_life(run_folder: Path, events: list[Event]) -> float:
    """Seconds since 1970 of the last event that shows progress, or of the last step where that is later."""
    return last_seen(run_folder, [event for event in events if shows_progress(event)])


def last_seen(run_folder: Path, events: list[Event]) -> float:
    """Seconds since 1970 of the last line of events.jsonl, whatever it tells, or of the last step where that is later;
    0: neither is there."""
    times = [written_at(event) for event in events]
    metrics = run_folder / METRICS_FILE
    if metrics.is_file():
        times.append(metrics.stat().st_mtime)
    return max(times, default=0.0)


def _decoded(line: bytes) -> tuple[Event | None, str]:
    """The event of a line, or why it is none."""
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None, "is no JSON"
    wrong = wrong_with(event)
    return (event, "") if wrong is None else (None, wrong)


class EventsLog:
    """The open events.jsonl of one launch, on its logging rank. The run folder's lock guards it."""

    def __init__(self, path: Path):
        self.path = path
        self._file = -1
        self._lock = threading.RLock()  # the watchdog writes too, from its thread
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
            self._mend()
        except OSError as error:
            self._give_up(error)

    def write(self, kind: str, *, at: float | None = None, **fields: Any) -> None:
        """Appends one event. A disk error is logged, not raised; no more events are then written.

        Args: at: its time, in seconds since 1970; by default now.
        """
        assert kind in EVENTS, kind
        event = {"event": kind, "time": time.time() if at is None else at, **fields}
        line = json.dumps(event).encode() + b"\n"
        with self._lock:
            if self._file < 0:
                return
            try:
                # One call, as in metrics_log: a kill leaves the line whole or torn at the end.
                if os.write(self._file, line) < len(line):
                    raise OSError("the line was not written whole; is the disk full?")
            except OSError as error:
                self._give_up(error)

    def close(self) -> None:
        """A second call does nothing."""
        with self._lock:
            if self._file >= 0:
                os.close(self._file)
                self._file = -1

    def _mend(self) -> None:
        """Cuts off a torn last line. Of a whole file one byte is read."""
        size = os.fstat(self._file).st_size
        if size and os.pread(self._file, 1, size - 1) != b"\n":
            os.ftruncate(self._file, os.pread(self._file, size, 0).rfind(b"\n") + 1)

    def _give_up(self, error: OSError) -> None:
        logger.warning("%s: no more events, training goes on: %s", self.path, error)
        self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

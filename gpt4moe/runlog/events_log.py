"""events.jsonl: what befell a run besides its steps, for all its starts; lines are only ever added.

    open (a torn last line is cut off) -> start -> first_step -> pause -> checkpoint -> pause -> evaluation ... -> stop
    kill -9 -> no stop: the next start notes the last sign of life -> start ...

metrics.jsonl tells what the run is (each step once), this file what it cost: runlog/goodput.py adds it up. A failure
to write is one warning: it never stops training.
"""

import json
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from gpt4moe.runlog.event_fields import EVENTS, Event, wrong_with
from gpt4moe.runlog.metrics import Record
from gpt4moe.runlog.metrics_log import METRICS_FILE

logger = logging.getLogger(__name__)

EVENTS_FILE = "events.jsonl"


def read_events(path: Path) -> list[Event]:
    """All events, in order; lines that a kill or a full disk tore were left out. No readable file is an empty list."""
    return scan_events(path)[0]


def scan_events(path: Path) -> tuple[list[Event], list[str]]:
    """The events, in order, and what is wrong with the other lines; a torn last line is as a kill leaves it."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return [], []
    except OSError as error:
        logger.warning("%s cannot be read: %s", path, error)
        return [], [f"{path.name} cannot be read: {error.strerror}"]
    events, wrong = [], []
    # Not splitlines(): of bytes it knows \r too.
    *lines, torn = data.split(b"\n")
    for number, line in enumerate([*lines, torn], start=1):
        event, why = _decoded(line)
        if event is not None:
            events.append(event)
        elif number <= len(lines):
            wrong.append(f"{path.name} line {number} {why}")
    return events, wrong


def told_at(event: Event) -> float:
    """When an event was written; a start's time is that of its process, seconds earlier."""
    return float(event["written"] if "written" in event else event["time"])


def own_events(events: list[Event]) -> list[Event]:
    """Without those of another run: a copied folder under a new name has its parent's events before its own."""
    starts = [index for index, event in enumerate(events) if event["event"] == "start"]
    first = len(events)
    for index in reversed(starts):
        if events[index]["run"] != events[starts[-1]]["run"]:
            break
        first = index
    return events[first:]


def before_start(run_folder: Path, run_name: str, resumed_step: int, records: Sequence[Record]) -> Event:
    """What a start from `resumed_step` finds of the one before it; nothing lost where there was none of this run.

    Args: records: metrics.jsonl as the start before left it, steps that will be redone included.
    """
    fields: Event = {"last_sign_of_life": None, "redone_steps": 0, "redone_seconds": 0.0}
    events = own_events(read_events(run_folder / EVENTS_FILE))
    if not events or events[0]["run"] != run_name:
        return fields
    redone = [record for record in records if record["step"] > resumed_step]
    fields["last_sign_of_life"] = last_sign_of_life(run_folder, events)
    fields["redone_steps"] = len(redone)
    fields["redone_seconds"] = sum(float(record.get("step_seconds", 0.0)) for record in redone)
    return fields


def last_sign_of_life(run_folder: Path, events: list[Event]) -> float:
    """Seconds since 1970 of the last event, or of the last step where that is later."""
    times = [told_at(event) for event in events]
    metrics = run_folder / METRICS_FILE
    if metrics.is_file():
        times.append(metrics.stat().st_mtime)
    return max(times, default=0.0)


def _decoded(line: bytes) -> tuple[Event | None, str]:
    """The event of a line, or what is wrong with it."""
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None, "is no JSON"
    wrong = wrong_with(event)
    return (event, "") if wrong is None else (None, wrong)


class EventsLog:
    """The open events.jsonl of one start, on its logging rank. The run folder's lock guards it."""

    def __init__(self, path: Path):
        self.path = path
        self._file = -1
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
            self._mend()
        except OSError as error:
            self._give_up(error)

    def write(self, kind: str, *, at: float | None = None, **fields: Any) -> None:
        """Appends one event. Raises nothing for what a disk can do.

        Args: at: its time; by default now.
        """
        assert kind in EVENTS, kind
        if self._file < 0:
            return
        event = {"event": kind, "time": time.time() if at is None else at, **fields}
        line = json.dumps(event).encode() + b"\n"
        try:
            # One call, as in metrics_log: a kill leaves the line whole or torn at the end.
            if os.write(self._file, line) < len(line):
                raise OSError("the line was not written whole; is the disk full?")
        except OSError as error:
            self._give_up(error)

    def close(self) -> None:
        """A second call does nothing."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _mend(self) -> None:
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.ftruncate(self._file, whole)

    def _give_up(self, error: OSError) -> None:
        logger.warning("%s: no more events, training goes on: %s", self.path, error)
        self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

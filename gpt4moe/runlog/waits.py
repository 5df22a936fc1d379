"""What a start waits for while no step ends: its start-up, a checkpoint, an evaluation; and how long that took before.

Training keeps Waits while it runs; `idle_since` reads the same from events.jsonl, for a look from outside. Both make
an Idle, by which the rule `stalled` tells a long save from a hang.
"""

import time
from collections.abc import Callable, Mapping, Sequence

from gpt4moe.runlog.alerts import Idle
from gpt4moe.runlog.event_fields import PAUSES, Event

START_UP = "start_up"


class Waits:
    """What one start of a run is doing since when. Its methods may be called from two threads.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._longest: dict[str, float] = {}
        self._doing = (START_UP, clock())  # one tuple: another thread never sees half of it

    def started(self, age_seconds: float, longest: Mapping[str, float]) -> None:
        """The process is that old; `longest` of the starts before it."""
        self._longest = dict(longest)
        self._doing = (START_UP, self._clock() - age_seconds)

    def begin(self, kind: str) -> None:
        """Training waits for `kind` from now on."""
        self._doing = (kind, self._clock())

    def end(self) -> float:
        """A step, or what training waited for, is done. Returns: the seconds it took."""
        (kind, since), now = self._doing, self._clock()
        self._longest[kind] = max(now - since, self._longest.get(kind, 0.0))
        self._doing = ("", now)
        return now - since

    def idle(self) -> Idle:
        kind, since = self._doing
        return Idle(self._clock() - since, kind, self._longest.get(kind, 0.0) if kind else 0.0)


def longest_waits(events: Sequence[Event]) -> dict[str, float]:
    """Kind -> seconds of the longest that came to its end."""
    longest: dict[str, float] = {}
    began = None
    for event in events:
        kind, seconds = event["event"], event.get("seconds", 0.0)
        if kind == "start":
            began = event["time"]
        elif kind == "first_step" and began is not None:
            kind, seconds = START_UP, event["time"] - began
        if kind in PAUSES or kind == START_UP:
            longest[kind] = max(seconds, longest.get(kind, 0.0))
    return longest


def idle_since(events: Sequence[Event], last_step_time: float, now: float) -> Idle:
    """What the last start is doing, as its events tell; it must be running.

    Args:
        events: of the run, in order; with a start.
        last_step_time: when metrics.jsonl was written last.
    """
    # An alert is a sign of life of the process, not of its progress.
    told = [event for event in events if event["event"] != "alert"]
    of_start = told[max(index for index, event in enumerate(told) if event["event"] == "start") :]
    longest = longest_waits(events)
    if not any(event["event"] == "first_step" for event in of_start):
        return Idle(now - of_start[0]["time"], START_UP, longest.get(START_UP, 0.0))
    last = of_start[-1]
    if last["event"] == "pause":
        return Idle(now - last["time"], last["what"], longest.get(last["what"], 0.0))
    return Idle(now - max(last["time"], last_step_time))

"""What training waits for while no step ends: its start-up, a checkpoint, an evaluation; and how long that took before.

    while training:           Waits.begin, end -> Waits.idle -> Idle
    from outside, afterwards: events.jsonl -> idle_since -> Idle

By an Idle the alert rule `stalled` (alerts.py) tells a long save from a hang.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from gpt4moe.runlog.events_log import PAUSES, Event

START_UP = "start_up"


@dataclass(frozen=True, slots=True)
class Idle:
    """The time since the last step ended, and what training does in it."""

    seconds: float = 0.0
    kind: str = ""
    """start_up, checkpoint, evaluation ...; empty: the next step."""
    longest_seconds: float = 0.0
    """The longest one of this kind before; 0: there was none."""

    @property
    def what(self) -> str:
        return self.kind.replace("_", "-")


class Waits:
    """What one launch of a run is doing, and since when. Its methods may be called from two threads.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._longest: dict[str, float] = {}
        self._doing = (START_UP, clock())  # one tuple: another thread never sees half of it

    def started(self, age_seconds: float, longest: Mapping[str, float]) -> None:
        """Sets the age of this process, and the longest waits of the launches before it."""
        self._longest = dict(longest)
        self._doing = (START_UP, self._clock() - age_seconds)

    def begin(self, kind: str) -> None:
        """Training waits for `kind` from now on."""
        self._doing = (kind, self._clock())

    def end(self) -> float:
        """The step, or what training waited for, is done. Returns: the seconds it took."""
        (kind, since), now = self._doing, self._clock()
        self._longest[kind] = max(now - since, self._longest.get(kind, 0.0))
        self._doing = ("", now)
        return now - since

    def idle(self) -> Idle:
        kind, since = self._doing
        return Idle(self._clock() - since, kind, self._longest.get(kind, 0.0) if kind else 0.0)


def longest_waits(events: Sequence[Event]) -> dict[str, float]:
    """Kind -> seconds of the longest wait that came to its end."""
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
    """What the last launch is doing, by its events; it must be running.

    Args:
        events: of the run, in order; with a start.
        last_step_time: when metrics.jsonl was written last.
    """
    # An alert shows that the process lives, not that it makes progress.
    shown = [event for event in events if event["event"] != "alert"]
    of_launch = shown[max(index for index, event in enumerate(shown) if event["event"] == "start") :]
    longest = longest_waits(events)
    if not any(event["event"] == "first_step" for event in of_launch):
        return Idle(now - of_launch[0]["time"], START_UP, longest.get(START_UP, 0.0))
    last = of_launch[-1]
    if last["event"] == "pause":
        return Idle(now - last["time"], last["what"], longest.get(last["what"], 0.0))
    return Idle(now - max(last["time"], last_step_time))

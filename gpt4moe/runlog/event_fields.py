"""The events of a run, as a table: what each is, and what its fields must be. events_log.py writes and reads them.

A reader leaves out a line that is not as it should be, and says which: a list of runs must outlive any file.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Event = dict[str, Any]
Check = Callable[[Any], bool]

_LATEST = 253_370_764_800.0
"""The year 9999, in seconds since 1970: what a calendar can show."""


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
    meaning: str
    needs: Mapping[str, Check]
    """Besides `event` and `time` (seconds since 1970)."""
    may_have: Mapping[str, Check]


def _pause(meaning: str) -> EventKind:
    return EventKind(meaning=meaning, needs={"step": _count, "seconds": _seconds}, may_have={})


PAUSES: dict[str, EventKind] = {
    "checkpoint": _pause("training waited for a checkpoint (for the copy alone, where a thread writes it)"),
    "evaluation": _pause("training waited for the loss on held-out text"),
    "replica_check": _pause("training waited for the comparison of copies"),
    "report": _pause("loss.png and report.html were written"),
}
"""Written when they end."""

EVENTS: dict[str, EventKind] = {
    "start": EventKind(
        meaning="the process began; of Slurm: job, restart, submitted, job_started; of the start before: "
        "last_sign_of_life, redone_steps, redone_seconds; written: when this was told",
        needs={
            "run": _text, "job": _maybe(_count), "submitted": _maybe(_time), "job_started": _maybe(_time),
            "ranks": _count, "layout": _text, "total_steps": _count, "resumed_step": _count,
            "last_sign_of_life": _maybe(_time), "redone_steps": _count, "redone_seconds": _seconds,
        },
        may_have={"written": _time, "restart": _count},
    ),
    "first_step": EventKind(
        meaning="the first step of a start is done", needs={"step": _count, "seconds": _seconds}, may_have={}
    ),
    "pause": EventKind(
        meaning="training begins to wait: for what, the name of the event that ends it",
        needs={"what": _text, "step": _count}, may_have={},
    ),
    **PAUSES,
    "alert": EventKind(
        meaning="an alert of configs/dashboard.yaml began", needs={"step": _count, "name": _text, "text": _text},
        may_have={},
    ),
    "stop": EventKind(
        meaning="the end, in order; reason: finished, a signal's name, or an error's class; cause in words, where we "
        "know it",
        needs={"step": _count, "reason": _text, "is_error": _flag}, may_have={"cause": _maybe(_text)},
    ),
}  # fmt: skip


def wrong_with(event: Any) -> str | None:
    """What a decoded line lacks to be an event; None for one that is whole."""
    kind = event.get("event") if isinstance(event, dict) else None
    if not isinstance(kind, str) or kind not in EVENTS:
        return "is no event"
    lacking = sorted({"time", *EVENTS[kind].needs} - set(event))
    if lacking:
        return f"is a {kind} without {', '.join(lacking)}"
    checks = {"time": _time, **EVENTS[kind].needs, **EVENTS[kind].may_have}
    odd = [name for name, check in checks.items() if name in event and not check(event[name])]
    return f"is a {kind} whose {odd[0]} is {event[odd[0]]!r}"[:100] if odd else None

"""Interruptions of a run: each time that a launch ended before the run was done, in one line: when, what, where, cost.

events.jsonl, goodput's launches    when, what, the steps and seconds that it cost
logs/JOB-RESTART.failed             which rank on which node was the first to fail (slurm/rank.sh)
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from gpt4moe.runlog.events_log import WENT_BACK, Event
from gpt4moe.runlog.goodput import Attempt, by_launch, redone

_FINISHED = ("finished", "running")
_FAILED = re.compile(r"(\d+)-(\d+)\.failed")
_COST = ("queue", "down", "start_up")


@dataclass(frozen=True, kw_only=True, slots=True)
class Interruption:
    """One end of a launch, and what it cost until the next one had its first step."""

    at: float
    """Seconds since 1970: after a kill or an error the last sign of life, else the stop."""
    step: int
    """The last step done."""
    what: str
    """killed, hang, a signal's name, an error's class."""
    where: str
    """The rank and its node, where it is known; else empty."""
    cause: str
    """In words, where it is known."""
    redone_steps: int
    redone_seconds: float
    waited_seconds: float
    """From the end to the next first step: down, in the queue, starting up. 0 while there is no next launch."""

    @property
    def cost_seconds(self) -> float:
        return self.redone_seconds + self.waited_seconds


def interruptions(
    events: Sequence[Event], attempts: Sequence[Attempt], failed: Mapping[tuple[int, int], str]
) -> list[Interruption]:
    """In the order in which they came; the last one too, where the run is not done.

    Args:
        attempts: Goodput.attempts of the same events.
        failed: (job, its restart) -> which rank failed first (first_failures).
    """
    launches = by_launch(events)
    lost = [redone(launches, key) for key in ("redone_steps", "redone_seconds")]
    found = []
    following: list[Attempt | None] = [*attempts[1:], None]
    for index, (own, attempt, after) in enumerate(zip(launches, attempts, following, strict=True)):
        if attempt.end in _FINISHED:
            continue
        stop = next((event for event in own if event["event"] == "stop"), None)
        hang = next((event for event in own if event["event"] == "hang"), None)
        # A launch that was told to rest leaves a cause too: what it found last.
        cause = str((hang or stop or {}).get("cause") or "")
        has_next = after is not None
        found.append(
            Interruption(
                at=attempt.ended,
                step=attempt.last_step,
                what="hang" if hang else "went back" if attempt.end == WENT_BACK else attempt.end,
                where=failed.get((own[0].get("job") or -1, own[0].get("restart", 0)), "") or _named(cause),
                cause=cause,
                redone_steps=int(lost[0][index + 1]) if has_next else 0,
                redone_seconds=lost[1][index + 1] if has_next else 0.0,
                waited_seconds=sum(after.seconds[cause] for cause in _COST) if after is not None else 0.0,
            )
        )
    return found


def first_failures(run_folder: Path) -> dict[tuple[int, int], str]:
    """(job, its restart) -> the rank that failed first and its node, as slurm/rank.sh left it: a link to
    "137: rank 3 on node2"."""
    found = {}
    for link in run_folder.glob("logs/*.failed"):
        match = _FAILED.fullmatch(link.name)
        if match and link.is_symlink():
            found[int(match[1]), int(match[2])] = os.readlink(link).partition(": ")[2]
    return found


def _named(cause: str) -> str:
    """A rank that a cause names."""
    match = re.search(r"\branks? \d+(?:, \d+)*(?: on [\w.-]+)?", cause, re.IGNORECASE)
    return match[0] if match else ""


def up_times(attempts: Sequence[Attempt]) -> list[tuple[float, float]]:
    """From each launch's first step to its end, in seconds since 1970; without launches that had no step."""
    spans = [(attempt.began + attempt.seconds["start_up"], attempt.ended) for attempt in attempts]
    return [(began, ended) for began, ended in spans if ended > began]


def shares_up(attempts: Sequence[Attempt], slots: int) -> list[float]:
    """The run's wall time in `slots` equal parts: of each the share, 0 to 1, in which a launch was making steps."""
    first, last = attempts[0].began, max(attempt.ended for attempt in attempts)
    width = (last - first) / slots
    if width <= 0:
        return []
    edges = [first + width * slot for slot in range(slots + 1)]
    up = up_times(attempts)
    return [
        min(1.0, sum(max(0.0, min(ended, right) - max(began, left)) for began, ended in up) / width)
        for left, right in pairwise(edges)
    ]

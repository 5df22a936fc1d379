"""Goodput: the share of a run's wall time that went into steps that count, and where the rest went.

One launch of a run over time; a part that a launch does not have takes no time:

    submitted   job begins    first step begins                              stop       next submitted
        | queue     | start-up      | steps, evaluation, checkpoints, other    |   down     | queue ...

Steps that a later launch did again do not count, and neither does the time after the last sign of life of a launch that
was killed or ended by an error.
A run that was finished and later extended loses nothing in between. Every second has exactly one cause, so the seconds
of all causes add up to the wall time: `other` is what is left of a launch, and is shown.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from gpt4moe.runlog.events_log import PAUSES, WENT_BACK, Event, own_events, shows_progress, written_at
from gpt4moe.runlog.metrics import Record

PRODUCTIVE = "productive"
CAUSES: dict[str, str] = {
    PRODUCTIVE: "steps that count",
    "start_up": "from the job's start to the first step: imports, groups, data, loading",
    "redone": "steps lost to a kill, or gone back from, and done again",
    "checkpoint": "training waited for a checkpoint",
    "evaluation": "loss on held-out text, evaluation tasks",
    "sampling": "texts of training.sample_prompts",
    "replica_check": "copies of one tensor compared",
    "recompute": "steps computed once more and compared",
    "report": "loss.png and report.html",
    "other": "between steps: metrics, console, wandb",
    "queue": "waiting in the queue",
    "down": "no steps: from a crash until it is noticed, and no job after it, a preemption or a stop by hand",
}
"""Every second of a run belongs to one of these; in the order they are shown."""


@dataclass(kw_only=True, slots=True)
class Attempt:
    """One launch and how it ended. Times are seconds since 1970."""

    job: int | None
    ranks: int
    layout: str
    began: float
    """The job's start where Slurm reports it, else the process's."""
    ended: float
    """Its stop; after a kill or an error its last sign of life."""
    resumed_step: int
    last_step: int
    """The last step it did."""
    end: str
    """finished, a signal, an error's class; `went_back`: the process went on from an earlier checkpoint; `killed`: no
    stop event; `running`."""
    seconds: dict[str, float] = field(default_factory=dict)
    """By cause; queue and down are the time before this launch. Steps are counted only in Goodput."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Goodput:
    """Where the wall time of one run went."""

    wall_seconds: float
    seconds: dict[str, float]
    """By cause, every one of CAUSES; they add up to wall_seconds."""
    attempts: list[Attempt]

    @property
    def restarts(self) -> int:
        """Launches after the first; a run that went back in one process was not launched again."""
        return sum(attempt.end != WENT_BACK for attempt in self.attempts[:-1])

    @property
    def share(self) -> float:
        """Productive over wall time, 0 to 1."""
        return self.seconds[PRODUCTIVE] / self.wall_seconds if self.wall_seconds > 0 else 0.0


def goodput(
    events: Sequence[Event],
    records: Iterable[Record],
    *,
    last_sign_of_life: float,
    is_running: bool = False,
    waiting_until: float | None = None,
) -> Goodput | None:
    """Where the wall time of a run went; None where it has no events.

    Args:
        events: events.jsonl, in order.
        records: metrics.jsonl, by step; each step counts once, as it was done last.
        last_sign_of_life: of the last launch: now, or events_log.last_sign_of_life.
        is_running: the last launch is still at work.
        waiting_until: now, when the run's job waits in the queue.
    """
    starts = by_launch(events)
    if not starts:
        return None
    steps = {int(record["step"]): float(record["step_seconds"]) for record in records if "step_seconds" in record}
    last_step = max(steps, default=0)
    attempts: list[Attempt] = []
    for start, following in zip(starts, [*(start[0] for start in starts[1:]), None], strict=True):
        end = _end(start, following, last_sign_of_life, is_running)
        done = last_step if following is None else following["resumed_step"] + following["redone_steps"]
        attempts.append(_attempt(start, end, max(done, start[0]["resumed_step"]), attempts[-1] if attempts else None))
    total = dict.fromkeys(CAUSES, 0.0)
    for attempt in attempts:
        for cause, seconds in attempt.seconds.items():
            total[cause] += seconds
    total[PRODUCTIVE] = sum(seconds for step, seconds in steps.items() if step > attempts[0].resumed_step)
    total["redone"] = sum(redone(starts, "redone_seconds"))
    total["other"] -= total[PRODUCTIVE] + total["redone"]
    if waiting_until is not None:
        total["queue"] += max(0.0, waiting_until - attempts[-1].ended)
    return Goodput(wall_seconds=sum(total.values()), seconds=total, attempts=attempts)


def redone(launches: Sequence[Sequence[Event]], key: str) -> list[float]:
    """What each launch found to be done again, counted once.

    A launch that ends before its first step may leave the lines of these steps in metrics.jsonl, and the next one
    counts them too.

    Args:
        launches: the events of each launch, its start first.
        key: redone_steps or redone_seconds.
    """
    found, before = [], 0.0
    for events in launches:
        own = float(events[0][key])
        found.append(max(0.0, own - before))
        has_stepped = any(event["event"] == "first_step" for event in events)
        before = 0.0 if has_stepped else max(own, before)
    return found


def first_step_began(launch: Sequence[Event]) -> float | None:
    """When the first step of a launch began, in seconds since 1970; None: it had none. A step's seconds are those of
    one computation, so those of a second one (`recompute`) come before them."""
    first = next((event for event in launch if event["event"] == "first_step"), None)
    if first is None:
        return None
    again = (it["seconds"] for it in launch if it["event"] == "recompute" and it["step"] == first["step"])
    return float(first["time"] - first["seconds"] - next(again, 0.0))


def by_launch(events: Sequence[Event]) -> list[list[Event]]:
    """The events of each launch of the last run, its start first."""
    return _by_start(own_events(list(events)))


def _by_start(events: list[Event]) -> list[list[Event]]:
    """Each launch: its start event, and the events up to the next launch."""
    groups: list[list[Event]] = []
    for event in events:
        if event["event"] == "start":
            groups.append([])
        if groups:
            groups[-1].append(event)
    return groups


def _end(start: list[Event], following: Event | None, last_sign_of_life: float, is_running: bool) -> tuple[float, str]:
    """When a launch ended, and why."""
    stop = next((event for event in start if event["event"] == "stop"), None)
    if stop is not None and not stop.get("is_error"):
        return stop["time"], stop["reason"]
    latest = max(written_at(event) for event in start if shows_progress(event))
    seen = last_sign_of_life if following is None else following.get("last_sign_of_life") or 0.0
    if stop is not None:
        return min(stop["time"], max(latest, seen)), stop["reason"]
    return max(latest, seen), "running" if following is None and is_running else "killed"


def _attempt(events: list[Event], end: tuple[float, str], last_step: int, before: Attempt | None) -> Attempt:
    start, (ended, reason) = events[0], end
    submitted, job_started, began = start["submitted"], start["job_started"], start["time"]
    if before is not None and job_started is not None and job_started < before.ended:
        submitted = job_started = None  # a job with several launches: the later ones did not wait in the queue
    if job_started is not None:
        began = min(began, job_started)
    free = before.ended if before is not None else began
    began = max(began, free)  # clocks of two nodes may differ
    queued_from = began if submitted is None else min(began, submitted if before is None else max(submitted, free))
    was_finished = before is None or before.end == "finished"
    seconds = {"queue": began - queued_from, "down": 0.0 if was_finished else queued_from - free}
    for pause in PAUSES:
        seconds[pause] = sum(event["seconds"] for event in events if event["event"] == pause)
    first, ended = first_step_began(events), max(ended, began)
    first_began = ended if first is None else min(ended, first)
    seconds["start_up"] = max(0.0, first_began - began)
    # All that has no cause yet; `goodput` subtracts the steps of all launches together.
    seconds["other"] = ended - began - seconds["start_up"] - sum(seconds[pause] for pause in PAUSES)
    return Attempt(
        job=start.get("job"), ranks=start["ranks"], layout=start["layout"], began=began, ended=ended,
        resumed_step=start["resumed_step"], last_step=last_step, end=reason, seconds=seconds,
    )  # fmt: skip

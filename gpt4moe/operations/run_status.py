"""The status of runs, from their folders and Slurm's queue, as tools/runs.py shows it. No torch.

run folders -> job numbers -> Slurm's states -> RunStatus each (state, step, loss, speed, ETA, goodput)
"""

import itertools
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from gpt4moe.checkpoint.health import SUSPECT, reasons
from gpt4moe.config.yaml_text import load_yaml
from gpt4moe.errors import Gpt4MoeError
from gpt4moe.operations.run_state import IDENTITY_FILE, activity, job_of, last_jobs, state_of
from gpt4moe.runlog import slurm_queue
from gpt4moe.runlog.alerts import FiredAlert, Stalled, failing_alerts
from gpt4moe.runlog.dashboard import dashboard_of
from gpt4moe.runlog.events_log import (
    EVENTS_FILE,
    WENT_BACK,
    Event,
    last_seen,
    last_sign_of_life,
    own_events,
    scan_events,
)
from gpt4moe.runlog.goodput import Goodput, goodput
from gpt4moe.runlog.interruptions import Interruption, first_failures, interruptions
from gpt4moe.runlog.metrics import Record
from gpt4moe.runlog.metrics_glance import WHOLE_STEPS, glance_at_metrics
from gpt4moe.runlog.metrics_log import METRICS_FILE, read_metrics
from gpt4moe.runlog.run_files import SUMS_FILE, has_other_sum
from gpt4moe.runlog.waits import Idle

_FROZEN_FILE = "resolved.yaml"

Looked = TypeVar("Looked")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunStatus:
    """The status of one run. A field is None if its value is not known."""

    name: str
    folder: str
    state: str
    """finished, running, waiting, stopped, failed, killed, unknown, damaged."""
    why: str
    """Why it stopped or is damaged: a signal, the class of an error, or a sentence."""
    job: int | None = None
    job_state: str | None = None
    """Slurm's state of the job; None if Slurm does not know the job (any more)."""
    doing: Idle | None = None
    """For a running run: what it waits for, or how long its current step has lasted."""
    is_stuck: bool = False
    """Whether the alert rule `stalled` fires for what the run is doing."""
    wrong: list[str] = field(default_factory=list)
    """A sentence for each damaged or missing file of the folder."""
    step: int = 0
    total_steps: int | None = None
    loss: float | None = None
    tokens_per_second: float | None = None
    """Median over the last 50 steps."""
    eta_seconds: float | None = None
    """Remaining time at the speed of the last launch, its pauses included; only while the run runs or waits."""
    restarts: int = 0
    interruptions: list[Interruption] = field(default_factory=list)
    """Each end of a launch before the run was done."""
    went_back: list[str] = field(default_factory=list)
    """A sentence for each time that the run went back to an earlier checkpoint."""
    suspect: list[str] = field(default_factory=list)
    """A sentence for each suspect checkpoint."""
    last_seen: float | None = None
    """Seconds since 1970 of the last step or event."""
    account: Goodput | None = None
    alerts: list[FiredAlert] = field(default_factory=list)
    """Alerts that fire now; only for a running run."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        answer = asdict(self)
        del answer["account"]
        if self.loss is not None and not math.isfinite(self.loss):
            answer["loss"] = None  # NaN is no JSON
        known = self.account
        answer["goodput"] = known and known.share
        answer["wall_seconds"] = known and known.wall_seconds
        answer["seconds"] = known and known.seconds
        answer["starts"] = [asdict(attempt) for attempt in known.attempts] if known else []
        return answer


@dataclass(frozen=True, kw_only=True, slots=True)
class _Seen:
    """Facts of a run folder, read before Slurm is asked."""

    folder: Path
    events: list[Event]
    wrong: list[str]
    jobs: list[int]


def statuses(folders: Sequence[Path], *, now: float | None = None) -> list[RunStatus]:
    """The status of each run. A damaged folder gives a status too. Slurm is asked once for all runs."""
    time_now = now or time.time()
    seen = [_unless_damaged(folder, partial(_see, folder)) for folder in folders]
    jobs = {job for it in seen if isinstance(it, _Seen) for job in it.jobs}
    known = slurm_queue.states_of(jobs) if slurm_queue.is_there() else {}
    return [
        it if isinstance(it, RunStatus) else _unless_damaged(it.folder, partial(_status, it, known, time_now))
        for it in seen
    ]


def _unless_damaged(folder: Path, look: Callable[[], Looked]) -> Looked | RunStatus:
    """The result of `look`; if it raises, the status of a damaged run, with the reason."""
    try:
        return look()
    # Every exception: a damaged folder must not hide the other runs.
    except Exception as error:
        why = error.cause if isinstance(error, Gpt4MoeError) else f"{type(error).__name__}: {error}"
        why = " ".join(why.split()) if os.path.exists(folder) else "its folder vanished while it was read"
        return RunStatus(name=folder.name, folder=str(folder), state="damaged", why=why)


def _see(folder: Path) -> _Seen:
    next(folder.iterdir(), None)  # raises for a folder that may not be read, which would look empty
    events, wrong = scan_events(folder / EVENTS_FILE)
    events = own_events(events)
    if events or (folder / METRICS_FILE).exists():  # otherwise its first launch has not written them yet
        wrong += [f"{name} {why}" for name, read in _FILES.items() if (why := _wrong_with(folder / name, read))]
    if any(event["event"] == "first_step" for event in events) and not (folder / METRICS_FILE).exists():
        wrong.append(f"{METRICS_FILE} is missing")
    return _Seen(folder=folder, events=events, wrong=wrong, jobs=last_jobs(folder, events))


_FILES: dict[str, Callable[[str], Any]] = {
    IDENTITY_FILE: json.loads,
    _FROZEN_FILE: load_yaml,
}
"""File that every run has from its first launch on -> its reader."""


def _wrong_with(file: Path, read: Callable[[str], Any]) -> str:
    """What is wrong with a file that must hold a mapping; empty if nothing is."""
    try:
        if not isinstance(read(file.read_text()), dict):
            return "holds something else"
        return f"is not what {SUMS_FILE} says" if has_other_sum(file.parent, file.name) else ""
    except FileNotFoundError:
        return "is missing"
    except (OSError, ValueError, RecursionError):
        return "cannot be read"


def _status(seen: _Seen, job_states: Mapping[int, str], now: float) -> RunStatus:
    folder, events, job = seen.folder, seen.events, job_of(seen.jobs, job_states)
    job_state = None if job is None else job_states.get(job)
    known: dict[str, Any] = dict(name=folder.name, folder=str(folder), job=job, job_state=job_state, wrong=seen.wrong)
    starts = [event for event in events if event["event"] == "start"]
    total = starts[-1]["total_steps"] if starts else _total_steps(folder)
    state, why = state_of(folder, events, job_state, total)
    is_alive, seen_alive = state == "running", last_sign_of_life(folder, events)
    try:  # of a run that trains a rule may need any metric of any step
        records = (read_metrics if is_alive else glance_at_metrics)(folder / METRICS_FILE)
    except Gpt4MoeError as error:
        return RunStatus(state="damaged", why=error.cause, **known)
    known["wrong"] = seen.wrong + _gaps(records)
    step = int(records[-1]["step"]) if records else 0
    doing = activity(folder, events, job, now) if is_alive else None
    rules = dashboard_of(folder).alerts if is_alive else []
    alerts = failing_alerts(rules, records, doing) if doing is not None else []
    account = goodput(
        events, records, last_sign_of_life=now if is_alive else seen_alive, is_running=is_alive,
        waiting_until=now if state == "waiting" else None,
    )  # fmt: skip
    return RunStatus(
        **known,
        state=state,
        why=why,
        doing=doing,
        step=step,
        total_steps=total,
        loss=float(records[-1]["loss"]) if records and "loss" in records[-1] else None,
        tokens_per_second=_speed(records),
        eta_seconds=_eta(folder, events, records, seen_alive, total) if state in ("running", "waiting") else None,
        restarts=max(0, len(starts) - 1 - _count_back(events), len(list(folder.glob("starts/*.yaml"))) - 1),
        went_back=[
            f"step {it['step']} went back to step {it['to_step']}, {it['samples']} samples passed over: {it['cause']}"
            for it in events
            if it["event"] == "go_back"
        ],
        suspect=[
            f"{path.parent.name}: {reason}"
            for path in sorted(folder.glob(f"checkpoints/step-*/{SUSPECT}"))
            for reason in reasons(path.parent)
        ],
        last_seen=last_seen(folder, events) or None,
        alerts=alerts,
        is_stuck=bool({alert.name for alert in rules if isinstance(alert.rule, Stalled)} & {it.name for it in alerts}),
        account=account,
        interruptions=interruptions(events, account.attempts, first_failures(folder)) if account else [],
    )


def _count_back(events: list[Event]) -> int:
    return sum(event["event"] == "stop" and event["reason"] == WENT_BACK for event in events)


def _gaps(records: list[Record]) -> list[str]:
    """Steps between the first and the last that have no line in metrics.jsonl."""
    if not records or records[-1]["step"] - records[0]["step"] + 1 == len(records):  # each step once, ascending
        return []
    steps = [int(record["step"]) for record in records]
    gaps = [(before + 1, after - 1) for before, after in itertools.pairwise(steps) if after != before + 1]
    counts = ((first, "1 step" if first == last else f"{last - first + 1} steps") for first, last in gaps)
    return [f"{METRICS_FILE} lacks {count} from {first} on" for first, count in counts]


def _speed(records: list[Record]) -> float | None:
    speeds = [float(record["tokens_per_second"]) for record in records[-WHOLE_STEPS:] if "tokens_per_second" in record]
    return statistics.median(speeds) if speeds else None


def _eta(
    folder: Path, events: list[Event], records: list[Record], seen: float, total: int | None
) -> float | None:  # fmt: skip
    if not records or total is None:
        return None
    if "eta_seconds" in records[-1] and _has_ramp(folder):  # steps differ in size: the run's own counts tokens
        return float(records[-1]["eta_seconds"])
    step = int(records[-1]["step"])
    pace = float(records[-1].get("step_seconds", 0.0))
    first = next((event for event in reversed(events) if event["event"] in ("first_step", "start")), None)
    if first is not None and first["event"] == "first_step" and step > first["step"]:
        pace = (seen - first["time"]) / (step - first["step"])
    return pace * max(0, total - step)


def _has_ramp(folder: Path) -> bool:
    try:
        return bool({"batch_ramp", "length_ramp"} & set(_FILES[IDENTITY_FILE]((folder / IDENTITY_FILE).read_text())))
    except (OSError, ValueError, TypeError, RecursionError):
        return False


def _total_steps(folder: Path) -> int | None:
    """For runs of versions that wrote no events."""
    try:
        steps = _FILES[_FROZEN_FILE]((folder / _FROZEN_FILE).read_text())["training"]["steps"]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return steps if isinstance(steps, int) else None

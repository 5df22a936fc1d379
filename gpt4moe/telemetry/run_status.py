"""Where a run stands, from its folder and the queue: what tools/runs.py shows. No torch.

run folders -> job numbers -> Slurm's states -> RunStatus each (state, step, loss, speed, ETA, goodput)
"""

import difflib
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from gpt4moe.errors import Gpt4MoeError, LaunchError
from gpt4moe.telemetry import slurm_queue
from gpt4moe.telemetry.alerts import Told, standing
from gpt4moe.telemetry.dashboard import dashboard_of
from gpt4moe.telemetry.events_log import EVENTS_FILE, Event, last_sign_of_life, own_events, read_events
from gpt4moe.telemetry.goodput import Goodput, goodput
from gpt4moe.telemetry.metrics import Record
from gpt4moe.telemetry.metrics_log import METRICS_FILE, read_metrics
from gpt4moe.telemetry.run_process import holder, is_at_work

_SPEED_STEPS = 50
_RUNNING = ("RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED")
_WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunStatus:
    """One run. None: not known."""

    name: str
    folder: str
    state: str
    """finished, running, waiting, stopped, failed, killed, unknown, damaged."""
    why: str
    """Of a stop or a damage: a signal, an error's class, words."""
    job: int | None
    job_state: str | None
    """Slurm's word; None: Slurm does not know the job (any more)."""
    step: int = 0
    total_steps: int | None = None
    loss: float | None = None
    tokens_per_second: float | None = None
    """Median of the last 50 steps."""
    eta_seconds: float | None = None
    """At the pace of the last start, its pauses included; only while it runs or waits."""
    restarts: int = 0
    last_seen: float | None = None
    """Seconds since 1970 of the last step or event."""
    account: Goodput | None = None
    alerts: list[Told] = field(default_factory=list)
    """What is wrong now with a run that is running."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        answer = asdict(self)
        del answer["account"]
        known = self.account
        answer["goodput"] = known and known.share
        answer["wall_seconds"] = known and known.wall_seconds
        answer["seconds"] = known and known.seconds
        answer["starts"] = [asdict(attempt) for attempt in known.attempts] if known else []
        return answer


def is_run_folder(path: Path) -> bool:
    return (path / "identity.json").is_file()


def run_folders(paths: Sequence[Path]) -> list[Path]:
    """The run folders among `paths` and right below them, by name. Raises: LaunchError for what is no folder."""
    found = []
    for path in paths:
        if not path.is_dir():
            raise LaunchError(f"{path} is no folder.", "Give a run folder (runs/first), or the folder of your runs.")
        found += [path] if is_run_folder(path) else sorted(inner for inner in path.iterdir() if is_run_folder(inner))
    return found


def named_run(name: str, root: Path = Path("runs")) -> Path:
    """The run folder that `name` means: a path, or a name below `root`. Raises: LaunchError naming the nearest."""
    for path in (Path(name), root / name):
        if is_run_folder(path):
            return path
    names = [path.name for path in sorted(root.iterdir()) if is_run_folder(path)] if root.is_dir() else []
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.4) or names[:3]
    raise LaunchError(
        f"{name} is no run folder, and no run in {root}.",
        f"There are: {', '.join(near)}." if near else f"Give the path of a run folder: {root} has none.",
    )


def statuses(folders: Sequence[Path], *, now: float | None = None) -> list[RunStatus]:
    """The status of each; a run whose files cannot be read says so. One question to Slurm for all."""
    events = {folder: own_events(read_events(folder / EVENTS_FILE)) for folder in folders}
    jobs = {folder: _last_job(folder, events[folder]) for folder in folders}
    known = slurm_queue.states_of({job for job in jobs.values() if job is not None}) if slurm_queue.is_there() else {}
    return [
        _status(folder, events[folder], jobs[folder], known.get(jobs[folder] or -1), now or time.time())
        for folder in folders
    ]


def _last_job(folder: Path, events: list[Event]) -> int | None:
    """The job of the last start; the newest log's where no start came that far."""
    logged = [int(log.name.split("-")[0]) for log in folder.glob("logs/*-*.log") if log.name.split("-")[0].isdecimal()]
    started = [event["job"] for event in events if event["event"] == "start" and event["job"] is not None]
    return max([*logged, *started[-1:]], default=None)


def _status(folder: Path, events: list[Event], job: int | None, job_state: str | None, now: float) -> RunStatus:
    try:
        records = read_metrics(folder / METRICS_FILE)
    except Gpt4MoeError as error:
        return RunStatus(
            name=folder.name, folder=str(folder), state="damaged", why=error.cause, job=job, job_state=job_state
        )
    starts = [event for event in events if event["event"] == "start"]
    step = int(records[-1]["step"]) if records else 0
    total = starts[-1]["total_steps"] if starts else _total_steps(folder)
    state, why = _state(folder, events, job_state, is_done=total is not None and step >= total)
    is_alive, seen = state == "running", last_sign_of_life(folder, events)
    return RunStatus(
        name=folder.name,
        folder=str(folder),
        state=state,
        why=why,
        job=job,
        job_state=job_state,
        step=step,
        total_steps=total,
        loss=float(records[-1]["loss"]) if records else None,
        tokens_per_second=_speed(records),
        eta_seconds=_eta(events, records, seen, total) if state in ("running", "waiting") else None,
        restarts=max(0, (len(starts) or len(list(folder.glob("starts/*.yaml")))) - 1),
        last_seen=seen or None,
        alerts=_alerts(folder, events, records, now) if is_alive else [],
        account=goodput(
            events, records, last_sign_of_life=now if is_alive else seen, is_running=is_alive,
            waiting_until=now if state == "waiting" else None,
        ),
    )  # fmt: skip


def _state(folder: Path, events: list[Event], job_state: str | None, *, is_done: bool) -> tuple[str, str]:
    if is_done:
        return "finished", ""
    if job_state is not None and job_state.startswith(_RUNNING):
        return "running", ""
    if job_state is not None and job_state.startswith(_WAITING):
        return "waiting", ""
    if is_at_work(folder):
        return "running", ""
    stop = events[-1] if events and events[-1]["event"] == "stop" else None
    if stop is not None:
        return "failed" if stop["is_error"] else "stopped", stop["reason"]
    if not events:
        return "stopped", ""
    found = holder(folder)
    # Without a word of Slurm, a process of another node may live or not.
    is_elsewhere = found is not None and found[1] != os.uname().nodename and job_state is None
    return ("unknown", f"on {found[1]}") if found and is_elsewhere else ("killed", "")


def _alerts(folder: Path, events: list[Event], records: list[Record], now: float) -> list[Told]:
    # An alert is a sign of life of the process, not of its progress.
    seen = last_sign_of_life(folder, [event for event in events if event["event"] != "alert"])
    return standing(dashboard_of(folder).alerts, records, now - seen)


def _speed(records: list[Record]) -> float | None:
    speeds = [float(record["tokens_per_second"]) for record in records[-_SPEED_STEPS:] if "tokens_per_second" in record]
    return statistics.median(speeds) if speeds else None


def _eta(events: list[Event], records: list[Record], seen: float, total: int | None) -> float | None:
    if not records or total is None:
        return None
    step = int(records[-1]["step"])
    pace = float(records[-1]["step_seconds"])
    first = next((event for event in reversed(events) if event["event"] in ("first_step", "start")), None)
    if first is not None and first["event"] == "first_step" and step > first["step"]:
        pace = (seen - first["time"]) / (step - first["step"])
    return pace * max(0, total - step)


def _total_steps(folder: Path) -> int | None:
    """Of a run from before there were events."""
    frozen = folder / "resolved.yaml"
    found = yaml.safe_load(frozen.read_text()) if frozen.is_file() else {}
    steps = found.get("training", {}).get("steps")
    return steps if isinstance(steps, int) else None

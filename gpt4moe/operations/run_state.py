"""Which folders are runs, the state of each run, and what a running one is doing. The state is decided in this order:

Slurm's queue has the job, running or waiting -> running or waiting
a process of this machine has locked the folder -> running
else by the end of the last launch: its stop event, or no such event (killed)
"""

import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from gpt4moe.errors import LaunchError
from gpt4moe.runlog.events_log import EVENTS_FILE, WENT_BACK, Event, last_sign_of_life
from gpt4moe.runlog.metrics_log import METRICS_FILE
from gpt4moe.runlog.run_files import holder, is_at_work, process_began
from gpt4moe.runlog.waits import START_UP, Idle, idle_since, longest_waits

IDENTITY_FILE = "identity.json"
_SIGNS = (IDENTITY_FILE, EVENTS_FILE, METRICS_FILE)


def is_run_folder(path: Path) -> bool:
    """Whether a run or slurm/train.sh has left files here. A folder that may not be read counts as one."""
    if not os.path.isdir(path):
        return False
    # os.path: pathlib raises where the permission is lacking.
    is_closed = not os.access(path, os.R_OK | os.X_OK)
    return is_closed or any(os.path.exists(path / sign) for sign in _SIGNS) or bool(job_logs(path))


def job_logs(run_folder: Path) -> dict[tuple[int, int], Path]:
    """(job, its restart) -> log of each launch under Slurm: logs/<job>-<restart>.log."""
    words = {log: log.stem.split("-") for log in run_folder.glob("logs/*-*.log")}
    return {
        (int(word[0]), int(word[1])): log
        for log, word in words.items()
        if len(word) == 2 and all(number.isdecimal() for number in word)
    }


def run_folders(paths: Sequence[Path]) -> list[Path]:
    """The run folders among `paths` and directly below, by name. Raises: LaunchError for a path that is no folder."""
    found = []
    for path in paths:
        if not os.path.isdir(path):
            raise LaunchError(f"{path} is no folder.", "Give a run folder (runs/first), or the folder of your runs.")
        found += [path] if is_run_folder(path) else _runs_in(path)
    return found


def named_run(name: str, root: Path = Path("runs")) -> Path:
    """The run folder with a path, or with a name below `root`. Raises: LaunchError that names similar runs."""
    for path in (Path(name), root / name):
        if is_run_folder(path):
            return path
    names = [path.name for path in _runs_in(root)] if root.is_dir() else []
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.4) or names[:3]
    raise LaunchError(
        f"{name} is no run folder, and no run in {root}.",
        f"There are: {', '.join(near)}." if near else f"Give the path of a run folder: {root} has none.",
    )


def _runs_in(folder: Path) -> list[Path]:
    return sorted(inner for inner in folder.iterdir() if is_run_folder(inner))


_RUNNING = ("RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED")
_WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD")


def last_jobs(folder: Path, events: Sequence[Event]) -> list[int]:
    """The job of the last launch, and later jobs that have a log but no start event; ascending."""
    started = [event["job"] for event in events if event["event"] == "start" and event["job"] is not None][-1:]
    return sorted({*started, *(job for job, _ in job_logs(folder) if job > max(started, default=-1))})


def job_of(jobs: Sequence[int], states: Mapping[int, str]) -> int | None:
    """The job of last_jobs that decides the run's state: the newest one in the queue, else the newest.

    A later job may have been refused while an earlier one was running.
    """
    in_queue = [job for job in jobs if states.get(job, "").startswith((*_RUNNING, *_WAITING))]
    return max(in_queue or jobs, default=None)


def state_of(folder: Path, events: Sequence[Event], job_state: str | None, total: int | None) -> tuple[str, str]:
    """The state (RunStatus.state) and why.

    Args:
        events: the events of this run alone, in order.
        job_state: Slurm's state of the last launch's job; None: Slurm does not know the job.
        total: the last step of the run.
    """
    if job_state is not None and job_state.startswith(_RUNNING):
        return "running", ""
    if job_state is not None and job_state.startswith(_WAITING):
        return "waiting", ""
    if is_at_work(folder):
        return "running", ""
    ends = [it for it in events if it["event"] == "start" or (it["event"] == "stop" and it["reason"] != WENT_BACK)]
    stop = ends[-1] if ends else None
    if stop is not None and stop["event"] == "stop":
        if stop["is_error"]:
            return "failed", stop["reason"]
        return ("finished", "") if stop["reason"] == "finished" else ("stopped", stop["reason"])
    if total is not None and _is_saved(folder, total):
        return "finished", ""  # killed after its last step was saved
    if not events:
        return "stopped", ""
    found = holder(folder)
    # Without Slurm, nothing here tells whether a process of another node is alive.
    if found is not None and found[1] != os.uname().nodename and job_state is None:
        return "unknown", f"on {found[1]}"
    return "killed", ""


def activity(folder: Path, events: Sequence[Event], job: int | None, now: float) -> Idle:
    """What a running run is doing, and since when. Args: job: its running job (job_of)."""
    began = _launch_without_event(folder, events, job)
    if began is not None:
        return Idle(now - began, START_UP, longest_waits(events).get(START_UP, 0.0))
    if not any(event["event"] == "start" for event in events):
        return Idle()
    return idle_since(events, last_sign_of_life(folder, []), now)


def _launch_without_event(folder: Path, events: Sequence[Event], job: int | None) -> float | None:
    """When the latest launch began, if it has no event yet: it still imports, connects or loads, or it hangs."""
    last = next((event for event in reversed(events) if event["event"] == "start"), None)
    newest = max((item for item in job_logs(folder).items() if item[0][0] == job), default=None)
    known = (-1, 0) if last is None else (last["job"], last.get("restart", 0))
    if newest is not None and known[0] is not None and newest[0] > known:
        return newest[1].stat().st_mtime  # time of its last output; the launch began a little earlier
    found = holder(folder)
    if found is not None and is_at_work(folder):
        began = process_began(found[0])
        if last is None or began > last["time"] + 1.0:
            return began
    return None


def _is_saved(folder: Path, step: int) -> bool:
    # The manifest is written last (checkpoint/manifest.py); an imported constant would bring the checkpoint room here.
    return (folder / "checkpoints" / f"step-{step:08d}" / "manifest.json").is_file()

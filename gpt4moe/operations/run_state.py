"""In which state a run is, by the queue, its process and its events; and what a living one is doing.

the queue says running or waiting -> that
a process of this machine holds the folder -> running
else how its last start ended: its stop, or none (killed)
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from gpt4moe.operations.run_folders import job_logs
from gpt4moe.runlog.events_log import Event, last_sign_of_life
from gpt4moe.runlog.run_files import holder, is_at_work, process_began
from gpt4moe.runlog.waits import START_UP, Idle, idle_since, longest_waits

_RUNNING = ("RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED")
_WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD")


def last_jobs(folder: Path, events: Sequence[Event]) -> list[int]:
    """The job of the last start, and later ones that have a log but no start: ascending."""
    started = [event["job"] for event in events if event["event"] == "start" and event["job"] is not None][-1:]
    return sorted({*started, *(job for job, _ in job_logs(folder) if job > max(started, default=-1))})


def job_of(jobs: Sequence[int], states: Mapping[int, str]) -> int | None:
    """The one of last_jobs that the run's state is of: the newest in the queue, for a later one may have been refused
    while it was at work; else the newest."""
    in_queue = [job for job in jobs if states.get(job, "").startswith((*_RUNNING, *_WAITING))]
    return max(in_queue or jobs, default=None)


def state_of(
    folder: Path, events: Sequence[Event], job_state: str | None, *, step: int, total: int | None
) -> tuple[str, str]:
    """The state (RunStatus.state) and why.

    Args:
        events: of this run alone, in order.
        job_state: Slurm's word for the last start's job; None: it knows none.
        step, total: the last step done, and the one to stop at.
    """
    if job_state is not None and job_state.startswith(_RUNNING):
        return "running", ""
    if job_state is not None and job_state.startswith(_WAITING):
        return "waiting", ""
    if is_at_work(folder):
        return "running", ""
    stop = next((event for event in reversed(events) if event["event"] in ("start", "stop")), None)
    if stop is not None and stop["event"] == "stop":
        if stop["is_error"]:
            return "failed", stop["reason"]
        return ("finished", "") if stop["reason"] == "finished" else ("stopped", stop["reason"])
    if total is not None and step >= total and _is_saved(folder, total):
        return "finished", ""  # killed when all was done
    if not events:
        return "stopped", ""
    found = holder(folder)
    # Without a word of Slurm, a process of another node may live or not.
    if found is not None and found[1] != os.uname().nodename and job_state is None:
        return "unknown", f"on {found[1]}"
    return "killed", ""


def activity(folder: Path, events: Sequence[Event], job: int | None, now: float) -> Idle:
    """What a running run is doing, and since when. Args: job: the one that is at work (job_of)."""
    unheard = _start_without_word(folder, events, job)
    if unheard is not None:
        return Idle(now - unheard, START_UP, longest_waits(events).get(START_UP, 0.0))
    if not any(event["event"] == "start" for event in events):
        return Idle()
    return idle_since(events, last_sign_of_life(folder, []), now)


def _start_without_word(folder: Path, events: Sequence[Event], job: int | None) -> float | None:
    """Since when a start is at work of which there is no event yet: it imports, connects, loads, or hangs in it."""
    last = next((event for event in reversed(events) if event["event"] == "start"), None)
    newest = max((item for item in job_logs(folder).items() if item[0][0] == job), default=None)
    known = (-1, 0) if last is None else (last["job"], last.get("restart", 0))
    if newest is not None and known[0] is not None and newest[0] > known:
        return newest[1].stat().st_mtime  # its last output: it began a little earlier
    found = holder(folder)
    if found is not None and is_at_work(folder):
        began = process_began(found[0])
        if last is None or began > last["time"] + 1.0:
            return began
    return None


def _is_saved(folder: Path, step: int) -> bool:
    # The manifest is written last (checkpoint/manifest.py); an imported constant would bring the checkpoint room here.
    return (folder / "checkpoints" / f"step-{step:08d}" / "manifest.json").is_file()

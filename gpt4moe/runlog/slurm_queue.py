"""What Slurm says of jobs: a line of `squeue`, or of `sacct` for those that have left the queue. Never an error.

Where there is no Slurm, or it does not answer, nothing is known: an empty answer.
"""

import shutil
import subprocess
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime

_SECONDS = 5.0
"""A controller that is down must cost a start or a table no more than this."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JobTimes:
    """Of a job, in seconds since 1970."""

    submitted: float
    """A requeue counts as a new submission, for Slurm too."""
    started: float


def is_there() -> bool:
    """Whether this machine has Slurm's commands."""
    return shutil.which("squeue") is not None


def states_of(jobs: Collection[int]) -> dict[int, str]:
    """Job -> RUNNING, PENDING (BeginTime), COMPLETED ...; jobs that Slurm knows nothing of are left out."""
    wanted = {str(job) for job in jobs}
    # Without a list of jobs: squeue refuses the whole list when one of them is long gone.
    rows = _table("squeue", "--all", "--noheader", "--states=all", "--format=%A|%T|%r") if wanted else []
    known = {}
    for job, state, reason in (row for row in rows if row[0] in wanted):
        waits = state == "PENDING" and reason not in ("", "None")
        known[int(job)] = f"{state} ({reason})" if waits else state
    gone = sorted(wanted - {str(job) for job in known}, key=int)
    if gone:
        asked = ("--noheader", "--parsable2", "--allocations", f"--jobs={','.join(gone)}", "--format=JobIDRaw,State")
        # "CANCELLED by 1000": the state is the first word.
        known |= {int(job): state.split()[0] for job, state in _table("sacct", *asked) if job in gone and state}
    return known


def times_of(job: int | None) -> JobTimes | None:
    """Of a job in the queue; None for no job, or where Slurm does not say."""
    if job is None:
        return None
    words = [word.partition("=") for word in _output("scontrol", "show", "job", "-o", str(job)).split()]
    told = {name: value for name, _, value in words}
    try:
        # Slurm prints local time without a zone.
        times = [datetime.fromisoformat(told[name]).timestamp() for name in ("SubmitTime", "StartTime")]
    except (KeyError, ValueError):
        return None
    return JobTimes(submitted=times[0], started=times[1])


def _table(*command: str) -> list[list[str]]:
    rows = [line.strip().split("|") for line in _output(*command).splitlines()]
    return [row for row in rows if row[0].isdecimal()]


def _output(*command: str) -> str:
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, timeout=_SECONDS, check=False, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return answer.stdout if answer.returncode == 0 else ""

"""The process behind a run folder, asked of the kernel: since when it runs, and whether it still does."""

import os
import re
import time
from pathlib import Path

_HOLDER = re.compile(r"process (\d+) on (\S+)")


def process_began(process: int | str) -> float:
    """Seconds since 1970, to 10 ms (psutil's are off by up to a second: the kernel tells its boot in whole ones).

    Args: process: its number, or "self".
    Raises: OSError when there is none.
    """
    after_name = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    began = int(after_name[19]) / os.sysconf("SC_CLK_TCK")  # since boot: field 22 of proc(5)
    return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - began)


def holder(run_folder: Path) -> tuple[int, str] | None:
    """Process and node that locked the folder last (training/run_folder.py); it may be long gone."""
    lock = run_folder / ".lock"
    found = _HOLDER.match(lock.read_text(errors="replace")) if lock.is_file() else None
    return (int(found[1]), found[2]) if found else None


def is_at_work(run_folder: Path) -> bool:
    """Whether the process that locked the folder lives on this machine. The lock itself is left alone: whoever tries
    it would stand in the way of a start."""
    found = holder(run_folder)
    if found is None or found[1] != os.uname().nodename:
        return False
    try:
        # A younger process than the lock got its number later.
        return process_began(found[0]) <= (run_folder / ".lock").stat().st_mtime + 0.1
    except OSError:
        return False

"""Files of a run folder: names, writing them whole, and which process works on the folder."""

import os
import re
import time
from pathlib import Path

EXPERT_LOAD_FILE = "expert_load.json"
"""{"layers": [...], "tokens": [[...]], "first_step", "last_step"}: tokens per expert over the last steps of a launch;
"history": expert_load.LoadHistory, over the whole run."""

WIRE_FILE = "wire.json"
"""{"step", "ranks", "sent": {group: {kind: bytes}}}: bytes that the first step of the last launch sent."""

RESULTS_FILE = "results.json"
"""What a demo measured at its end; "table", where it has one: rows of texts, the first its head; "sheets": PNG files of
the run folder -> what they show."""

_LOCK_OWNER = re.compile(r"process (\d+) on (\S+)")


def replace_file(path: Path, data: bytes) -> None:
    """Puts `data` at `path` in one step: after a kill a reader finds the old file or the new one, never half of one.

    The data is on the disk before it gets the name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with draft.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def process_began(process: int | str) -> float:
    """When a process began, in seconds since 1970, to 10 ms.

    Not by psutil, which is off by up to a second: it takes the boot time that the kernel gives in whole seconds.

    Args: process: its number, or "self".
    Raises: OSError when there is none.
    """
    after_name = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    began = int(after_name[19]) / os.sysconf("SC_CLK_TCK")  # since boot: field 22 of proc(5)
    return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - began)


def holder(run_folder: Path) -> tuple[int, str] | None:
    """Process and node that locked the folder last (training/run_folder.py); the process may have ended."""
    lock = run_folder / ".lock"
    found = _LOCK_OWNER.match(lock.read_text(errors="replace")) if lock.is_file() else None
    return (int(found[1]), found[2]) if found else None


def is_at_work(run_folder: Path) -> bool:
    """Whether the process that locked the folder runs on this machine.

    The lock itself is not tried: that would keep a launch from getting it.
    """
    found = holder(run_folder)
    if found is None or found[1] != os.uname().nodename:
        return False
    try:
        # A process that began after the lock was written has got the old one's number.
        return process_began(found[0]) <= (run_folder / ".lock").stat().st_mtime + 0.1
    except OSError:
        return False

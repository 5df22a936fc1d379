"""Files of a run folder: names, writing them whole, and which process works on the folder."""

import os
import re
import time
from pathlib import Path

from gpt4moe.config.checksums import SUMS, as_lines, file_sha256, read_sums

EXPERT_LOAD_FILE = "expert_load.json"
"""{"layers": [...], "tokens": [[...]], "first_step", "last_step"}: tokens per expert over the last steps of a launch;
"history": expert_load.LoadHistory, over the whole run."""

WIRE_FILE = "wire.json"
"""{"step", "ranks", "sent": {group: {kind: bytes}}}: bytes that the first step of the last launch sent."""

RESULTS_FILE = "results.json"
"""What a demo measured at its end; "table", where it has one: rows of texts, the first its head; "sheets": PNG files of
the run folder -> what they show."""

SUMS_FILE = SUMS
"""sha256 of the files that every launch relies on, as `sha256sum -c` reads it: resolved.yaml, identity.json, starts/*,
gone_back.json. Without it, in folders of before 2026-11-30, they are not checked."""

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


def add_sums(run_folder: Path, *names: str) -> None:
    """Notes the sha256 of files of a run folder that were just written. A SHA256SUMS that is damaged stays as it is:
    the next launch is told of it."""
    sums = read_sums(run_folder)
    if sums is not None:
        _write_sums(run_folder, sums | {name: file_sha256(run_folder / name) for name in names})


def _write_sums(run_folder: Path, sums: dict[str, str]) -> None:
    if sums:
        replace_file(run_folder / SUMS_FILE, as_lines(dict(sorted(sums.items()))).encode())
    else:  # one without a line is a damaged one
        (run_folder / SUMS_FILE).unlink(missing_ok=True)


def replace_noted(run_folder: Path, name: str, data: bytes) -> None:
    """replace_file of a file with a noted sha256. A kill amid it leaves the old or the new one, without a sum."""
    drop_sum(run_folder, name)
    replace_file(run_folder / name, data)
    add_sums(run_folder, name)


def drop_sum(run_folder: Path, name: str) -> None:
    """Takes a file out of the noted ones: it will be another."""
    sums = read_sums(run_folder)
    if sums is not None and sums.pop(name, None) is not None:
        _write_sums(run_folder, sums)


def has_other_sum(run_folder: Path, name: str) -> bool:
    """Whether a file is not the one whose sha256 was noted, or nothing says so any more: SHA256SUMS is damaged.

    Raises: OSError when it cannot be read.
    """
    sums = read_sums(run_folder)
    return sums is None or (name in sums and sums[name] != file_sha256(run_folder / name))


def noted_files(run_folder: Path, prefix: str) -> list[Path]:
    """The files whose sha256 was noted and whose names begin so; one of them may be gone."""
    return [run_folder / name for name in read_sums(run_folder) or {} if name.startswith(prefix)]


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

"""A file of every rank beside the run's folder: how fast it is on the disk, and whether other ranks see it. No torch.

rank 0: begin() -> <run.root>/.preflight-xxxxxxxx/     then, all at once as in a save: write(), then sees(rank 0's)
rank 0: end() removes it
"""

import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from gpt4moe.config.run import RunConfig

MOST_BYTES = 64 << 20
LEAST_BYTES = 4 << 20
"""Less is the time of one fsync, no speed."""
SEEN_WITHIN_SECONDS = 10.0
"""A network file system may show an older listing for seconds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DiskFacts:
    """What one rank found at the run's root."""

    free_bytes: int = 0
    """For this user; quotas are not seen."""
    bytes_per_second: float = 0.0
    """Written and synced, while all other ranks write."""
    sees_first: bool = False
    """Whether the first rank's file is there, as a shared file system would have it."""
    problem: str = ""


def begin(run: RunConfig) -> tuple[str, str]:
    """Makes the folder: its path and an empty text, or an empty one and why it cannot be made."""
    root = Path(run.run.root)
    try:
        root.mkdir(parents=True, exist_ok=True)
        return tempfile.mkdtemp(prefix=".preflight-", dir=root), ""
    except OSError as error:
        return "", f"{root} cannot be written: {error.strerror}"


def write(folder: Path, rank: int, size_bytes: float) -> DiskFacts:
    """Writes this rank's file and syncs it.

    Args:
        size_bytes: what this rank would save; MOST_BYTES of it are written.
    """
    size = int(min(MOST_BYTES, max(LEAST_BYTES, size_bytes)))
    block = os.urandom(1 << 20)  # zeros might be compressed away
    try:
        folder.mkdir(parents=True, exist_ok=True)  # where the root is no shared file system, this node has none yet
        free = shutil.disk_usage(folder).free
        if free < 2 * size:
            return DiskFacts(free_bytes=free, problem=f"{free / 1e9:.3g} GB free, too little for a test file")
        started = time.perf_counter()
        with probe_file(folder, rank).open("wb") as file:
            for _ in range(size // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        seconds = time.perf_counter() - started
    except OSError as error:
        return DiskFacts(problem=f"{folder.parent} cannot be written: {error.strerror}")
    return DiskFacts(free_bytes=free, bytes_per_second=size // len(block) * len(block) / seconds)


def sees(path: Path, within_seconds: float = SEEN_WITHIN_SECONDS) -> bool:
    """Whether a file that another rank has written appears here."""
    deadline = time.monotonic() + within_seconds
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
        try:
            os.listdir(path.parent)  # makes a network file system look again
        except OSError:
            continue
    return True


def probe_file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}"


def end(folder: Path) -> None:
    """Removes the folder; every rank calls it, for a folder that is not shared is there on each node."""
    shutil.rmtree(folder, ignore_errors=True)

"""Which folders are runs, and the one that a name means."""

import difflib
import os
from collections.abc import Sequence
from pathlib import Path

from gpt4moe.errors import LaunchError
from gpt4moe.runlog.events_log import EVENTS_FILE
from gpt4moe.runlog.metrics_log import METRICS_FILE

IDENTITY_FILE = "identity.json"
_SIGNS = (IDENTITY_FILE, EVENTS_FILE, METRICS_FILE)


def is_run_folder(path: Path) -> bool:
    """Whether a run left its files here, or slurm/train.sh its logs; a folder that may not be looked into counts."""
    if not os.path.isdir(path):
        return False
    # os.path: pathlib raises where the permission is lacking.
    is_closed = not os.access(path, os.R_OK | os.X_OK)
    return is_closed or any(os.path.exists(path / sign) for sign in _SIGNS) or bool(job_logs(path))


def job_logs(run_folder: Path) -> dict[tuple[int, int], Path]:
    """(job, its restart) -> log of each start under Slurm: logs/<job>-<restart>.log."""
    words = {log: log.stem.split("-") for log in run_folder.glob("logs/*-*.log")}
    return {
        (int(word[0]), int(word[1])): log
        for log, word in words.items()
        if len(word) == 2 and all(number.isdecimal() for number in word)
    }


def run_folders(paths: Sequence[Path]) -> list[Path]:
    """The run folders among `paths` and right below them, by name. Raises: LaunchError for what is no folder."""
    found = []
    for path in paths:
        if not os.path.isdir(path):
            raise LaunchError(f"{path} is no folder.", "Give a run folder (runs/first), or the folder of your runs.")
        found += [path] if is_run_folder(path) else _runs_in(path)
    return found


def named_run(name: str, root: Path = Path("runs")) -> Path:
    """The run folder that `name` means: a path, or a name below `root`. Raises: LaunchError naming the nearest."""
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

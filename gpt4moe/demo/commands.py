"""How a demo runs the project's own commands: shown, one after another or side by side. Part of the room demo."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from gpt4moe.errors import LaunchError

ROOT = Path(__file__).resolve().parents[2]


def run_python(console: Console, *command: object) -> None:
    """Runs Python, shows its command. Raises: LaunchError when it fails."""
    words = [str(word) for word in command]
    console.print(f"[dim]$ python {' '.join(words)}[/dim]", soft_wrap=True)
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment(), check=False)
    if done.returncode:
        raise LaunchError(f"python {words[0]} ended with status {done.returncode}.", "Its messages are above.")


def run_side_by_side(console: Console, logs: Mapping[Path, Sequence[str]], first: Sequence[str] | None) -> None:
    """Runs of Python at the same time: each takes one core.

    Args:
        logs: file that gets what a run prints -> its words.
        first: a further run, whose progress is shown.
    Raises: LaunchError when one fails; the others are ended.
    """
    started: dict[Path, subprocess.Popen[bytes]] = {}
    try:
        for log, words in logs.items():
            log.parent.mkdir(parents=True, exist_ok=True)
            console.print(f"[dim]$ python {' '.join(words)} > {log} 2>&1 &[/dim]", soft_wrap=True)
            with log.open("wb") as stream:
                started[log] = subprocess.Popen(
                    [sys.executable, *words], cwd=ROOT, env=environment(), stdout=stream, stderr=stream
                )
        if first is not None:
            run_python(console, *first)
        for log, process in started.items():
            if process.wait():
                raise LaunchError(f"The run of {log} ended with status {process.returncode}.", "Read its end.")
    finally:
        for process in started.values():
            if process.poll() is None:
                process.terminate()
                process.wait()


def environment() -> dict[str, str]:
    """Several threads cost more than they give with matrices as small as these, and much more on a busy machine."""
    return {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR", **os.environ}

"""A launch of the drill: ranks started, watched, and ended when they hang.

Warm ranks are forks of a server that has made the imports (0.1 s each); cold ones are processes of their own, as people
start them (5 s of processor time each). Both are watched by the class that launch_ranks uses.
"""

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from gpt4moe.drill.kinds import Fault
from gpt4moe.drill.rank import FAULTS, forked
from gpt4moe.drill.scene import LOGS, NOTES, Scene
from gpt4moe.parallel import local_ranks
from gpt4moe.parallel.rank_processes import Ranks, rank_variables, start_ranks
from gpt4moe.runlog.metrics_log import METRICS_FILE

_START_SECONDS = 180.0
"""Before its first step a launch may take this long."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """How a launch went. Times are seconds since 1970."""

    status: int
    began: float
    at: float
    came: dict[int, float]
    """Number of a fault -> when it came."""
    log: str


class _Forked:
    """A forked rank, as subprocess.Popen would be."""

    def __init__(self, process: ForkServerProcess):
        self.process = process
        process.start()

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def send_signal(self, sig: int, /) -> None:
        if self.process.is_alive() and self.process.pid is not None:
            os.kill(self.process.pid, sig)

    def kill(self) -> None:
        self.process.kill()

    def wait(self) -> int:
        self.process.join()
        return self.process.exitcode or 0


def warm_up() -> None:
    """Starts the server of warm ranks, which imports what they need. They run on CPUs, also where there is a GPU."""
    os.environ |= {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    local_ranks.preload("gpt4moe.drill.preload")
    local_ranks.start_server()


def launch(scene: Scene, name: str, faults: Sequence[Fault], *, is_cold: bool, hang_seconds: float) -> Ended:
    """The run's command once, until all of its ranks have ended.

    Args:
        hang_seconds: no step for so long, and the watchdog has not ended them: all ranks are killed.
    """
    notes = scene.folder / NOTES
    notes.mkdir(exist_ok=True)
    for old in notes.glob("*.*"):
        old.unlink()
    (notes / FAULTS).write_text(json.dumps([fault.to_json() for fault in faults]))
    logs = scene.folder / LOGS
    logs.mkdir(exist_ok=True)
    log = logs / f"{name}-{len(list(logs.iterdir())) + 1:03d}.log"
    arguments = [str(notes), *scene.overrides(name)]
    log.touch()
    ranks, began = Ranks(), time.time()
    try:
        if is_cold:
            with log.open("ab") as file:
                command = [sys.executable, "-m", "gpt4moe.drill.rank", *arguments]
                start_ranks(scene.ranks, command, os.environ, ranks, output=file)
        else:
            context = multiprocessing.get_context("forkserver")
            ranks.processes = [
                _Forked(context.Process(target=forked, args=(variables, arguments, str(log)), daemon=True))
                for variables in rank_variables(scene.ranks)
            ]
        ranks.wait(_watch(ranks, scene.run_folder(name) / METRICS_FILE, began, hang_seconds))
    finally:
        ranks.kill()
    came = {int(note.stem[-3:]): float(note.read_text().split()[0]) for note in notes.glob("fault-*.came")}
    return Ended(status=ranks.status()[0], began=began, at=time.time(), came=came, log=log.read_text(errors="replace"))


def _watch(ranks: Ranks, metrics: Path, began: float, hang_seconds: float) -> Callable[[], None]:
    def look() -> None:
        stepped = metrics.stat().st_mtime if metrics.exists() else 0.0
        if time.time() > (stepped + hang_seconds if stepped > began else began + _START_SECONDS):
            for process in ranks.processes:
                process.kill()

    return look

"""A launch whose ranks may be stopped, killed or end by themselves: processes forked from the server of run_ranks, each
with a file for what it prints. A fault is planted by a callback behind the run's own."""

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from gpt4moe.parallel import local_ranks
from gpt4moe.parallel.environment import Environment
from tests.training.command import SMALL, set_variables


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What befalls a rank after a step."""

    what: str
    """stop, kill, raise, sleep, sleep in layer, be slow, refuse (an error as of bad input, of it alone), go
    astray (into a collective that the others do not enter)."""
    rank: int
    after_step: int = 2


@dataclass(frozen=True, kw_only=True)
class Left:
    """How one rank ended: status, below 0 for a signal, None for one that had to be killed; and what it printed."""

    status: int | None
    out: str
    err: str


def launch(folder: Path, fault: Fault, *overrides: str, ranks: int, seconds: float = 240) -> list[Left]:
    """Runs the command with a fault, for so many seconds at most. Returns: how each rank ended."""
    local_ranks.start_server()
    arguments = [*SMALL, f"run.root={folder.parent}", f"run.name={folder.name}", "training.steps=6", *overrides]
    printed, port = folder.parent / f"{folder.name}-printed", local_ranks.free_port()
    printed.mkdir(parents=True)
    started = [
        local_ranks._CONTEXT.Process(target=_rank, args=(rank, ranks, port, arguments, fault, printed), daemon=True)
        for rank in range(ranks)
    ]
    for process in started:
        process.start()
    _await(started, fault, seconds)
    left = []
    for rank, process in enumerate(started):
        status = None if process.is_alive() else process.exitcode
        process.kill()
        process.join()
        left.append(Left(status=status, **{name: (printed / f"{rank}.{name}").read_text() for name in ("out", "err")}))
    return left


def _await(started: Sequence[ForkServerProcess], fault: Fault, seconds: float) -> None:
    """Until all ranks have ended, but for one that is stopped or sleeps for ever."""
    stuck = fault.rank if fault.what == "stop" else -1
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if not any(process.is_alive() for rank, process in enumerate(started) if rank != stuck):
            return
        time.sleep(0.1)


def _rank(rank: int, ranks: int, port: int, arguments: list[str], fault: Fault, printed: Path) -> None:
    import torch

    from gpt4moe.parallel import environment as resolver

    torch.set_num_threads(1)
    resolver.FIRST_STAYS_SECONDS = resolver.OTHERS_STAY_SECONDS = 0.0
    place = Environment(rank=rank, world_size=ranks, local_rank=rank, master=("127.0.0.1", port), source="test")
    set_variables(place, {})
    for name, stream in (("out", sys.stdout), ("err", sys.stderr)):
        file = os.open(printed / f"{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, stream.fileno())
    _plant(fault, rank)
    from gpt4moe.train import main

    status = main(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _after(wait: Callable[[], None], forward: Callable[..., Any]) -> Callable[..., Any]:
    def slow(*given: Any, **named: Any) -> Any:
        wait()
        return forward(*given, **named)

    return slow


def _as_long_as_worked() -> Callable[[], None]:
    """Sleeps for three times the time since its last sleep: on a busy machine, where others work longer, for longer."""
    ended = time.monotonic()

    def wait() -> None:
        nonlocal ended
        time.sleep(min(max(3 * (time.monotonic() - ended), 0.04), 1.0))
        ended = time.monotonic()

    return wait


def _plant(fault: Fault, rank: int) -> None:
    import torch
    from torch import distributed

    from gpt4moe.errors import ConfigError
    from gpt4moe.moe.layer import ExpertParallelMLP
    from gpt4moe.runlog.metrics import Record
    from gpt4moe.training import build, roll_call, watchdog
    from gpt4moe.training.callback import Callback
    from gpt4moe.training.state import TrainingContext
    from gpt4moe.training.step import StepResult

    class Planted(Callback):
        def on_step(self, context: TrainingContext, record: Record, result: StepResult) -> None:
            if (rank, context.state.step) != (fault.rank, fault.after_step):
                return
            if fault.what in ("stop", "kill"):
                os.kill(os.getpid(), signal.SIGSTOP if fault.what == "stop" else signal.SIGKILL)
            elif fault.what == "raise":
                raise RuntimeError("a planted error\nwith a second line")
            elif fault.what == "refuse":
                raise ConfigError("Only here.", "Mend it.")
            elif fault.what == "sleep":
                time.sleep(600)
            elif fault.what == "go astray":
                distributed.all_reduce(torch.zeros(1), group=context.groups.tp)
            else:
                wait = _as_long_as_worked() if fault.what == "be slow" else lambda: time.sleep(600)
                ExpertParallelMLP.forward = _after(wait, ExpertParallelMLP.forward)  # type: ignore[method-assign]

    roll_call._ALL_IS_WELL_SECONDS = 1.0
    watchdog._PATIENT = 3.0
    own = build.build_callbacks
    build.build_callbacks = lambda *given: [*own(*given), Planted()]

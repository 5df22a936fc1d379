"""run_ranks: calls a function on several gloo ranks of this machine and returns what each rank returned.

The ranks are forked from a server process that has made the heavy imports already. So a rank starts in about 0.1 s
instead of 5 s. This file does not import torch, so the process that starts the ranks stays small.
"""

import multiprocessing
import os
import random
import socket
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
PORTS = range(15000, 30000)
"""Below the ports that Linux gives to outgoing connections (32768 and up), so no connection can take the chosen one."""


class RanksFailed(Exception):
    """A rank raised an error, died or did not answer. The cause has the first such rank and its traceback."""

    def __init__(self, cause: str):
        super().__init__(cause)
        self.cause = cause


def preload(*modules: str) -> None:
    """Chooses the modules that the fork server imports once for all ranks. Call it before the first rank starts."""
    _CONTEXT.set_forkserver_preload(list(modules))


def start_server() -> None:
    """Starts the fork server, unless it runs already.

    Python 3.11 does not pass sys.path to the server, and the server ignores a module that it cannot import. Each rank
    would then import everything itself, which takes 5 s. So PYTHONPATH has this package while the server starts.
    Afterwards PYTHONPATH is as before, so that other child processes do not see the change.
    """
    before = os.environ.get("PYTHONPATH")
    root = str(Path(__file__).resolve().parents[2])
    os.environ["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [before])])
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def run_ranks(
    world_size: int, function: Callable[..., Any], *args: Any, timeout_seconds: float,
    on_progress: Callable[[str], None] | None = None,
) -> list[Any]:  # fmt: skip
    """Calls `function(environment, *args)` on each rank. Returns the results in the order of ranks.

    Args:
        function: at the top level of a module, so that a rank can import it. Its arguments and result are pickled.
        timeout_seconds: how long all ranks together may send nothing.
        on_progress: called with each text that rank 0 reports. If given, the function also gets an argument `say`,
            which it calls with such a text.
    Raises: RanksFailed.
    """
    start_server()
    port = free_port()
    pipes: list[Connection] = []
    ranks: list[ForkServerProcess] = []
    for rank in range(world_size):
        ours, theirs = _CONTEXT.Pipe(duplex=False)
        talks = on_progress is not None
        given = (theirs, rank, world_size, port, talks, function, args)
        process = _CONTEXT.Process(target=_rank, args=given, daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        ranks.append(process)
    try:
        return _collect(pipes, timeout_seconds, on_progress)
    finally:
        for process in ranks:
            process.kill()
            process.join()


def free_port() -> int:
    """A random port of PORTS on which no process listens. It is free until somebody else binds it, so use it at once.

    Port 0, by which the system chooses, would be one of those that it also gives to outgoing connections. Such a
    connection could take the port before rank 0 listens.
    """
    for port in random.SystemRandom().sample(PORTS, 100):  # not random's own state, which a test may have seeded
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise RanksFailed(f"no free port: 100 of the ports {PORTS[0]} to {PORTS[-1]} are in use")


def _collect(pipes: list[Connection], timeout_seconds: float, on_progress: Callable[[str], None] | None) -> list[Any]:
    results: dict[int, Any] = {}
    waiting = {pipe: rank for rank, pipe in enumerate(pipes)}
    while waiting:
        ready = wait(list(waiting), timeout_seconds)
        if not ready:
            raise RanksFailed(f"ranks {sorted(waiting.values())} did not answer within {timeout_seconds:g} s")
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = waiting[pipe]
            try:
                kind, value = pipe.recv()
            except EOFError:
                kind, value = "failed", "the process died"
            if kind == "failed":
                raise RanksFailed(f"rank {rank}: {value}")
            if kind == "said":
                if on_progress is not None and rank == 0:
                    on_progress(value)
                continue
            del waiting[pipe]
            results[rank] = value
    return [results[rank] for rank in range(len(pipes))]


def _rank(
    pipe: Connection, rank: int, world_size: int, port: int, talks: bool, function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:  # fmt: skip
    import torch

    from gpt4moe.parallel.environment import Environment

    torch.set_num_threads(1)
    master = ("127.0.0.1", port) if world_size > 1 else None
    environment = Environment(rank=rank, world_size=world_size, local_rank=rank, master=master, source="proof")
    extra = {"say": lambda text: pipe.send(("said", text))} if talks else {}
    try:
        pipe.send(("done", function(environment, *args, **extra)))
    except BaseException:
        pipe.send(("failed", traceback.format_exc()))

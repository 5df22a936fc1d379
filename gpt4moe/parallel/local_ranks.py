"""run_ranks: a function on several gloo ranks; a fork server with the heavy imports makes one in ~0.1 s, not 5 s.

No torch here: the process that starts the ranks stays light.
"""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")


class RanksFailed(Exception):
    """A rank raised, died or did not answer: the first one, with its traceback."""

    def __init__(self, cause: str):
        super().__init__(cause)
        self.cause = cause


def preload(*modules: str) -> None:
    """What the fork server imports once for all ranks; takes effect before its first rank."""
    _CONTEXT.set_forkserver_preload(list(modules))


def start_server() -> None:
    """Starts the fork server, unless it runs already.

    Python 3.11's server gets no sys.path and skips in silence what it cannot import: 5 s more for every rank. So it
    finds this package by PYTHONPATH, which no other child of this process may see.
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
    """What `function(environment, *args)` returned on each rank.

    Args:
        function: importable (top level of a module); its result and arguments travel by pipe.
        timeout_seconds: of silence on all ranks.
        on_progress: then the ranks' function also gets `say`, and what rank 0 says is handed on here.
    Raises: RanksFailed.
    """
    start_server()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
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

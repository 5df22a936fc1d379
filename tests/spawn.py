"""run_ranks: a function on several gloo ranks; a fork server with the heavy imports makes one in ~0.1 s, not 5 s."""

import multiprocessing
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.preload"])


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout_seconds: float = 240) -> list[Any]:
    """What `function(environment, *args)` returned on each rank.

    Args:
        function: importable (top level of a module); its result and arguments travel by pipe.
    Raises: AssertionError with the first failing rank's traceback, or after the timeout.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pipes, ranks = [], []
    for rank in range(world_size):
        ours, theirs = _CONTEXT.Pipe(duplex=False)
        process = _CONTEXT.Process(target=_rank, args=(theirs, rank, world_size, port, function, args), daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        ranks.append(process)
    try:
        return _collect(pipes, timeout_seconds)
    finally:
        for process in ranks:
            process.kill()
            process.join()


def _collect(pipes: list[Connection], timeout_seconds: float) -> list[Any]:
    results: dict[int, Any] = {}
    waiting = {pipe: rank for rank, pipe in enumerate(pipes)}
    while waiting:
        ready = wait(list(waiting), timeout_seconds)
        assert ready, f"ranks {sorted(waiting.values())} did not answer within {timeout_seconds} s"
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = waiting.pop(pipe)
            try:
                failed, value = pipe.recv()
            except EOFError:
                failed, value = True, "the process died"
            assert not failed, f"rank {rank}: {value}"
            results[rank] = value
    return [results[rank] for rank in range(len(pipes))]


def _rank(
    pipe: Connection, rank: int, world_size: int, port: int, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    import torch

    from gpt4moe.parallel.environment import Environment

    torch.set_num_threads(1)
    master = ("127.0.0.1", port) if world_size > 1 else None
    environment = Environment(rank=rank, world_size=world_size, local_rank=rank, master=master, source="test")
    try:
        pipe.send((False, function(environment, *args)))
    except BaseException:
        pipe.send((True, traceback.format_exc()))

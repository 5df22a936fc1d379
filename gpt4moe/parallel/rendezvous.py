"""How the ranks of a launch find each other: a store that rank 0 serves, or torchrun's agents, and who has not come.

    store_at()   connect  ->  each rank says that it is here  ->  the last one, or rank 0's patience, ends the wait

torch waits for the last rank without a word, and names none. Here rank 0 warns after a minute, and gives up by an error
that every rank has and that names the ranks that are missing. Ranks that came before rank 0 wait as long as it does.
"""

import logging
import os
import resource
import socket
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from datetime import timedelta
from typing import TypeVar

from torch import distributed

from gpt4moe.errors import HUNG, LaunchError
from gpt4moe.parallel.environment import Environment
from gpt4moe.parallel.layout import ranks_text

T = TypeVar("T")
logger = logging.getLogger(__name__)

_DOOR_KEY = "gpt4moe/door"
"""In the store of torchrun's agents: the port at which rank 0 tells the name of the launch."""
_WARN_SECONDS = 60.0
_CONNECT_SECONDS = 30.0
"""For one try. A store that thousands of ranks knock at takes its time."""
_QUESTIONS_PER_SECOND = 10_000
"""Of all ranks together, to one store; more where each would ask too seldom."""
_CONNECTIONS = 2
"""Of each rank to the store: torch's groups and the watchdog (board.py)."""
_OTHER_FILES = 256
_LISTEN_SECONDS = 20.0
"""How long rank 0 tries to get its port: the one before it may just be ending. Less than _CONNECT_SECONDS, after which
torch prints its own error on every other rank."""
_LONGEST_SLEEP_SECONDS = 1.0
"""A rank 0 that gives up serves its store for 2 s more (environment.FIRST_STAYS_SECONDS): all ranks ask within them."""
_VERDICT_SECONDS = 20.0
"""Longer than rank 0 the others wait, for what it says."""


def store_at(environment: Environment, timeout: timedelta, patience_seconds: float) -> distributed.Store:
    """The store by which the ranks of this launch talk, once all of them have come. Collective.

    Args:
        timeout: of what is asked of the store afterwards.
        patience_seconds: how long the ranks that came wait for the others.
    Raises: LaunchError with status 86, on every rank that came, when one did not; with status 2 on rank 0 when its port
        is another program's or the address is not its own.
    """

    def find() -> tuple[distributed.Store, str]:
        deadline = time.monotonic() + patience_seconds
        store = _connect(environment, deadline, patience_seconds)
        return store, _launch_of_agents(store, environment, deadline) if _agents_serve() else _step_name(environment)

    store, launch = _in_time(find, environment, patience_seconds)
    come = distributed.PrefixStore(f"come{launch}", store)
    _in_time(lambda: await_all(come, environment, patience_seconds), environment, patience_seconds)
    store.set_timeout(timeout)
    return distributed.PrefixStore(f"default_pg{launch}", store)


def await_all(store: distributed.Store, environment: Environment, patience_seconds: float) -> None:
    """Until every rank has called this. Raises: as store_at."""
    try:
        verdict = _verdict(store, environment, patience_seconds)
    except distributed.DistError as error:
        raise late("rank 0 came, and its store has gone before all ranks had come", told_by=1) from error
    if verdict != "met":
        raise late(verdict)


def _verdict(store: distributed.Store, environment: Environment, patience_seconds: float) -> str:
    """`met`, or why not."""
    rank, world_size = environment.rank, environment.world_size
    store.set(f"here/{rank}", "")
    if store.add("number", 1) == world_size:
        store.compare_set("verdict", "", "met")
    began = time.monotonic()  # not before: others may have waited long for rank 0, whose patience begins now
    deadline, warn_at = began + patience_seconds, began + min(_WARN_SECONDS, patience_seconds / 2)
    is_warned = False
    wait_seconds = 0.01
    longest = min(max(0.2, world_size / _QUESTIONS_PER_SECOND), _LONGEST_SLEEP_SECONDS)
    while not store.check(["verdict"]):
        time.sleep(wait_seconds)
        now, wait_seconds = time.monotonic(), min(2 * wait_seconds, longest)
        if rank == 0 and now > warn_at and not is_warned:
            is_warned = True
            logger.warning(
                "%s not come yet; %.0f s from now the launch ends with %d",
                missing_text(store, world_size), max(0.0, deadline - now), HUNG,
            )  # fmt: skip
        elif rank == 0 and now > deadline:
            who = missing_text(store, world_size)
            store.compare_set(
                "verdict", "", f"{who} not come in {patience_seconds:.0f} s, and {world_size} are waited for"
            )
        elif now > deadline + _VERDICT_SECONDS:
            raise late("rank 0 came, and stopped before all ranks had come", told_by=1)
    return str(store.get("verdict").decode())


def missing_text(store: distributed.Store, world_size: int) -> str:
    """Which ranks have not said that they are here, as the begin of a sentence."""
    missing = [rank for rank in range(world_size) if not store.check([f"here/{rank}"])]
    return f"{ranks_text(missing)} {'have' if len(missing) > 1 else 'has'}"


def late(cause: str, *, told_by: int = 0) -> LaunchError:
    """The error that ends with 86 the ranks that came. Args: told_by: the rank that prints it."""
    error = LaunchError(
        f"The ranks did not meet: {cause}.",
        "Look at what these ranks and their nodes do (stopped, in an import from a slow disk, on a network of their "
        "own). A training run waits for four times its resilience.hang_seconds.",
    )
    error.exit_code, error.told_by = HUNG, told_by
    return error


def _in_time(ask: Callable[[], T], environment: Environment, patience_seconds: float) -> T:
    """What `ask` returns or raises. It runs in a thread: torch waits for a store whose process is stopped without
    timeout (2.13, also where it connects), and inside torch no signal handler runs."""
    answer: Future[T] = Future()

    def run() -> None:
        try:
            answer.set_result(ask())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=run, name="meeting", daemon=True).start()
    wait([answer], patience_seconds + 2 * _VERDICT_SECONDS)
    if not answer.done():
        raise _no_answer(environment, patience_seconds)
    return answer.result()


def _no_answer(environment: Environment, patience_seconds: float, why: str = "") -> LaunchError:
    assert environment.master is not None
    who, (address, port) = "torchrun's agent" if _agents_serve() else "rank 0", environment.master
    told = f" ({why})" if why else ""
    return late(f"{who} does not answer at {address}:{port} after {patience_seconds:.0f} s{told}", told_by=1)


def _cannot_listen(port: int, why: str) -> LaunchError:
    return LaunchError(
        f"Rank 0 cannot listen at port {port} of {os.uname().nodename}: {why.rpartition('message: ')[2]}.",
        "Set MASTER_PORT to a free one, 1024 to 32767, the same on every rank; launch_ranks takes another each time.",
    )


def _not_reached(address: str, port: int, why: str) -> LaunchError:
    return LaunchError(
        f"Rank 0 on {os.uname().nodename} cannot reach its own store at {address}:{port}: {why}.",
        "Set MASTER_ADDR to a name or address of rank 0's node that every node can resolve and reach.",
    )


def _agents_serve() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _connect(environment: Environment, deadline: float, patience_seconds: float) -> distributed.TCPStore:
    """A client of the store; rank 0 serves it too, unless torchrun's agents do. Not torch's rendezvous: there rank 0
    waits for all clients before it says anything."""
    assert environment.master is not None
    address, port = environment.master
    serves = environment.rank == 0 and not _agents_serve()
    if serves:
        _allow_connections(environment.world_size)
    listen_until = time.monotonic() + _LISTEN_SECONDS
    while True:
        seconds = max(1.0, min(_CONNECT_SECONDS, deadline - time.monotonic()))
        try:
            return distributed.TCPStore(
                address, port, is_master=serves, timeout=timedelta(seconds=seconds), wait_for_workers=False,
                multi_tenant=serves,
            )  # fmt: skip
        except distributed.DistNetworkError as error:
            why = str(error).partition("\n")[0].rstrip(".")
        if serves:
            is_taken = "EADDRINUSE" in why
            if not is_taken and "EACCES" not in why:
                raise _not_reached(address, port, why)
            if not is_taken or time.monotonic() > listen_until:
                raise _cannot_listen(port, why)
            time.sleep(0.2)
        elif time.monotonic() > deadline:
            raise _no_answer(environment, patience_seconds, why)


def _allow_connections(world_size: int) -> None:
    """Lets rank 0's process have as many open files as its store has connections: 1024 is a usual limit.

    Raises: LaunchError when the system allows fewer: torch would let the last ranks wait without a word.
    """
    needed = _CONNECTIONS * world_size + _OTHER_FILES
    soft, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    is_limited = most != resource.RLIM_INFINITY
    if is_limited and most < needed:
        raise LaunchError(
            f"Rank 0 may have {most:,} open files, and the store of {world_size:,} ranks needs {needed:,}.",
            f"Raise the hard limit on its node (ulimit -Hn, LimitNOFILE of slurmd) to {needed:,}.",
        )
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, most))


def _step_name(environment: Environment) -> str:
    """Of a launch by srun. Two jobs on one node may have one port: ranks of another job, or of this one before it was
    requeued, are not taken for ranks of this launch. Other launchers say nothing that all ranks know alike."""
    job = environment.job
    return f"{job.job_id}.{job.step_id}.{job.restart_count}" if environment.source == "srun" else ""


def _launch_of_agents(store: distributed.Store, environment: Environment, deadline: float) -> str:
    """A name of this launch, the same on every rank, under torchrun's agents. Collective.

    The agents' store outlives its ranks (torch 2.13): ranks that are started again would find the addresses that those
    before left there, and wait for them until the timeout. So keys get the name of the launch. Ranks learn it from
    rank 0 itself, not from that store, where the name before may still stand: a port that an earlier rank 0 left is
    closed, for the agents start ranks again when all of the last ones have ended.
    """
    assert environment.master is not None
    name, address = uuid.uuid4().hex, environment.master[0]
    if environment.rank == 0:
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        door = socket.create_server(("", 0), family=family, backlog=4096, dualstack_ipv6=dual)
        store.set(_DOOR_KEY, str(door.getsockname()[1]))
        # Until the process ends: somebody who knocks by mistake must not take the place of a rank.
        threading.Thread(target=_tell_all, args=(door, name), name="door", daemon=True).start()
        return name
    while True:
        if store.check([_DOOR_KEY]):
            with suppress(OSError), socket.create_connection((address, int(store.get(_DOOR_KEY))), timeout=10) as asked:
                told = asked.makefile().read()
                if len(told) == len(name):
                    return told
        if time.monotonic() > deadline:
            raise late(f"rank 0 on {address} has told no name of this launch", told_by=1)
        time.sleep(0.1)


def _tell_all(door: socket.socket, name: str) -> None:
    while True:
        visitor, _ = door.accept()
        with suppress(OSError), visitor:
            visitor.sendall(name.encode())

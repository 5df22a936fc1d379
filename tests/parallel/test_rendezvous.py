"""Ranks that wait for one that never comes: it is named, before they give up and in the error that all of them have."""

import logging
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from types import SimpleNamespace

import pytest
from torch import distributed

from gpt4moe.errors import LaunchError
from gpt4moe.parallel import rendezvous
from gpt4moe.parallel.environment import Environment
from gpt4moe.parallel.local_ranks import free_port
from gpt4moe.parallel.rendezvous import await_all, store_at
from gpt4moe.parallel.slurm_job import SlurmJob
from gpt4moe.training import launch


def meet(
    ranks: list[int], world_size: int, seconds: float, port: int | None = None
) -> list[LaunchError | distributed.Store]:
    """These of the ranks come, each in a thread. Returns: what each has of it."""
    port = port or free_port()

    def come(rank: int) -> LaunchError | distributed.Store:
        place = Environment(
            rank=rank, world_size=world_size, local_rank=rank, master=("127.0.0.1", port), source="test"
        )
        try:
            return store_at(place, timedelta(seconds=20), seconds)
        except LaunchError as error:
            return error

    with ThreadPoolExecutor(len(ranks)) as threads:
        return list(threads.map(come, ranks))


def test_the_ranks_that_did_not_come_are_named_by_rank_0_to_all(caplog: pytest.LogCaptureFixture) -> None:
    store, told = distributed.HashStore(), []

    def come(rank: int) -> None:
        place = Environment(rank=rank, world_size=5, local_rank=rank, master=None, source="test")
        with pytest.raises(LaunchError) as error:
            await_all(store, place, 0.2)
        told.append((error.value.cause, error.value.exit_code, error.value.told_by))

    with caplog.at_level(logging.WARNING, "gpt4moe"), ThreadPoolExecutor(1) as threads:
        other = threads.submit(come, 2)
        while not store.check(["here/2"]):
            time.sleep(0.01)
        come(0)
        other.result()
    assert [record.getMessage().partition(";")[0] for record in caplog.records] == ["ranks 1, 3-4 have not come yet"]
    assert told == [("The ranks did not meet: ranks 1, 3-4 have not come in 0 s, and 5 are waited for.", 86, 0)] * 2


def test_a_rank_0_that_never_comes_is_told_by_rank_1_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("gpt4moe.parallel.environment.OTHERS_STAY_SECONDS", 0.0)
    came = meet([1, 2], 3, seconds=1.0)
    for rank, error in enumerate(came, start=1):
        assert isinstance(error, LaunchError) and "rank 0 does not answer at 127.0.0.1:" in error.cause
        place = Environment(rank=rank, world_size=1, local_rank=rank, master=None, source="test")
        assert launch.report(error, place, have_met=True) == 86
    assert capsys.readouterr().err.count("error: ") == 1


def test_a_rank_that_came_before_rank_0_waits_for_its_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    store, clock = distributed.HashStore(), [0.0]

    def connect(*_: object) -> distributed.Store:
        clock[0] += 1000  # rank 0 comes now
        return store

    def sleep(seconds: float) -> None:
        clock[0] += 10
        if clock[0] > 2200:  # rank 0's patience ends
            store.set("come/verdict", "rank 2 has not come")

    monkeypatch.setattr(rendezvous, "_connect", connect)
    monkeypatch.setattr(rendezvous, "time", SimpleNamespace(monotonic=lambda: clock[0], sleep=sleep))
    (error,) = meet([1], 3, seconds=1200)
    assert isinstance(error, LaunchError) and error.cause == "The ranks did not meet: rank 2 has not come."


def test_a_store_that_goes_while_ranks_meet_ends_them_with_86() -> None:
    server = [distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)]
    client = distributed.TCPStore("127.0.0.1", server[0].port, is_master=False, wait_for_workers=False)
    place = Environment(rank=1, world_size=2, local_rank=1, master=None, source="test")
    with ThreadPoolExecutor(1) as threads:
        other = threads.submit(await_all, client, place, 60.0)
        while not server[0].check(["here/1"]):
            time.sleep(0.01)
        server.clear()
        error = other.exception()
    assert isinstance(error, LaunchError) and error.exit_code == 86 and "its store has gone" in error.cause


def test_a_rank_0_that_is_stopped_is_not_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "_VERDICT_SECONDS", 0.1)
    place = Environment(rank=1, world_size=2, local_rank=1, master=None, source="test")
    with socket.create_server(("127.0.0.1", 0)) as server:  # its kernel takes connections, nobody answers
        place = replace(place, master=server.getsockname())
        with pytest.raises(LaunchError, match=r"rank 0 does not answer at 127\.0\.0\.1:") as error:
            store_at(place, timedelta(seconds=20), 0.1)
    for thread in threading.enumerate():
        if thread.name == "meeting":
            thread.join()
    assert error.value.exit_code == 86


def test_a_port_of_another_program_ends_in_its_name_and_a_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 cannot listen there; the others talk to a program that is no store."""
    monkeypatch.setattr(rendezvous, "_LISTEN_SECONDS", 0.1)
    with socket.create_server(("", 0)) as foreign:
        port = foreign.getsockname()[1]

        def greet() -> None:
            with suppress(OSError):
                while True:
                    visitor, _ = foreign.accept()
                    visitor.sendall(b"SSH-2.0-OpenSSH\r\n")

        threading.Thread(target=greet, daemon=True).start()
        first, other = meet([0, 1], 2, seconds=0.5, port=port)
        foreign.shutdown(socket.SHUT_RDWR)
    assert isinstance(first, LaunchError) and isinstance(other, LaunchError)
    assert f"Rank 0 cannot listen at port {port} of " in first.cause and first.cause.endswith(
        ": address already in use."
    )
    assert "Set MASTER_PORT" in first.cure and (first.exit_code, first.told_by) == (2, 0)
    assert "(Ping failed, invalid value returned from server" in other.cause and other.exit_code == 86


def test_an_address_that_is_not_rank_0s_is_no_port_of_another_program(monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(*_: object, **__: object) -> distributed.TCPStore:
        raise distributed.DistNetworkError("The client socket has timed out after 30000ms.\nException raised from ...")

    monkeypatch.setattr(distributed, "TCPStore", connect)
    place = Environment(rank=0, world_size=2, local_rank=0, master=("node7", 29500), source="test")
    with pytest.raises(
        LaunchError, match=r"cannot reach its own store at node7:29500: The client .* 30000ms\.\n"
    ) as error:
        store_at(place, timedelta(seconds=20), 1.0)
    assert "MASTER_ADDR" in error.value.cure and "MASTER_PORT" not in error.value.cure


def test_a_rank_of_another_job_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "_VERDICT_SECONDS", 0.5)
    port = free_port()

    def come(rank: int) -> str:
        job = SlurmJob(job_id=f"10{rank}07", step_id="0")
        place = Environment(rank=rank, world_size=2, local_rank=0, master=("127.0.0.1", port), source="srun", job=job)
        with pytest.raises(LaunchError) as error:
            store_at(place, timedelta(seconds=20), 0.5)
        return error.value.cause

    with ThreadPoolExecutor(2) as threads:
        first, _ = threads.map(come, (0, 1))
    assert "rank 1 has not come" in first


def test_rank_0_waits_for_a_port_that_is_just_being_left(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    with socket.create_server(("", port)) as left:
        pause = SimpleNamespace(monotonic=time.monotonic, sleep=lambda seconds: left.close())
        monkeypatch.setattr(rendezvous, "time", pause)
        (store,) = meet([0], 1, seconds=20, port=port)
    assert isinstance(store, distributed.Store)


def test_ranks_that_all_come_have_one_store() -> None:
    first, second = meet([1, 0], 2, seconds=20)
    assert isinstance(first, distributed.Store) and isinstance(second, distributed.Store)
    first.set("a", "b")
    assert second.get("a") == b"b"


def test_rank_0_may_open_as_many_connections_as_ranks_make_or_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    limits, given = (1024, 20_000), list[tuple[int, int]]()
    monkeypatch.setattr(rendezvous.resource, "getrlimit", lambda which: limits)
    monkeypatch.setattr(rendezvous.resource, "setrlimit", lambda which, pair: given.append(pair))
    rendezvous._allow_connections(8)
    assert given == []
    rendezvous._allow_connections(3072)
    assert given == [(2 * 3072 + 256, 20_000)]
    with pytest.raises(LaunchError, match="have 20,000 open files, and the store of 24,960 ranks needs 50,176") as e:
        rendezvous._allow_connections(24_960)
    assert e.value.exit_code == 2 and "LimitNOFILE" in e.value.cure

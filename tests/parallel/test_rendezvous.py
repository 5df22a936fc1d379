"""Ranks that wait for one that never comes: it is named, before they give up and in the error that all of them have."""

import logging
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch import distributed

from gpt4moe.errors import LaunchError
from gpt4moe.parallel.environment import Environment
from gpt4moe.parallel.local_ranks import free_port
from gpt4moe.parallel.rendezvous import await_all, store_at
from gpt4moe.training import launch


def meet(ranks: list[int], world_size: int, seconds: float) -> list[LaunchError | distributed.Store]:
    """These of the ranks come, each in a thread. Returns: what each has of it."""
    port = free_port()

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
            await_all(store, place, time.monotonic() + 0.2, 0.2)
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


def test_ranks_that_all_come_have_one_store() -> None:
    first, second = meet([1, 0], 2, seconds=20)
    assert isinstance(first, distributed.Store) and isinstance(second, distributed.Store)
    first.set("a", "b")
    assert second.get("a") == b"b"

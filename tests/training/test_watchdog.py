"""The watchdog of one process: what it must never end, and that it ends what hangs. Nothing is launched."""

import hashlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from gpt4moe.parallel.environment import Environment
from gpt4moe.resilience.hangs import End, Limits
from gpt4moe.runlog.waits import Waits
from gpt4moe.training import roll_call, watchdog
from gpt4moe.training.training_thread import TrainingThread
from gpt4moe.training.watchdog import Watchdog

Make = Callable[[float], Watchdog]


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The statuses with which a watchdog would have ended this process; it ends its thread instead."""
    statuses: list[int] = []

    def end(status: int) -> None:
        statuses.append(status)
        raise SystemExit

    monkeypatch.setattr(os, "_exit", end)
    return statuses


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def of(hang_seconds: float) -> Watchdog:
        place = Environment(rank=0, world_size=1, local_rank=0, master=None, source="one process")
        made = Watchdog(place, Limits(hang_seconds=hang_seconds), tmp_path, "cpu")
        waits = Waits()
        waits.end()
        made.follow(waits, 5, None)
        made.stepped(6, 0.2)
        return made

    return of


def move(seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        time.sleep(0.011)
        sorted(range(100))
        time.sleep(0.013)


def test_what_was_read_long_ago_says_nothing_of_a_step_that_stands_still(
    make: Make, ends: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roll_call, "_ALL_IS_WELL_SECONDS", 0.2)
    with make(6.0) as own:  # patience 4 s, beats are wanted after 3 s
        move(2)
        assert own.call.readings
        monkeypatch.setattr(roll_call, "_ALL_IS_WELL_SECONDS", 1000.0)
        move(4.5)
        time.sleep(4.5)
        own.stepped(7, 4.5)
        move(0.5)
        assert own.call.readings, "the beats were wanted"
    assert ends == []


def test_a_save_or_evaluation_that_moves_is_not_ended_when_it_ends(make: Make, ends: list[int]) -> None:
    with make(1.5) as own:
        own.thread.waits.begin("evaluation")
        move(7)  # 6 s are four times the limit of a step
        own.thread.waits.end()
        move(1)
        own.stepped(7, 0.2)
    assert ends == []


def test_each_pause_begins_to_count_anew(make: Make, ends: list[int]) -> None:
    with make(1.5) as own:
        for number in range(30):  # always at the same line
            began = time.monotonic()
            own.stepped(7 + number, 0.1)
            time.sleep(0.1)
            assert own.thread.still_seconds <= time.monotonic() - began
    assert ends == []


def test_a_process_that_was_stopped_as_a_whole_hangs_not(make: Make, ends: list[int]) -> None:
    own = make(1.5)
    now, own.thread._moved = time.monotonic(), time.monotonic() - 100
    own.thread._step_ended = own.thread._moved
    own.thread.start_again(has_stepped=True)
    own.call.forget()
    assert own.thread.still_seconds <= time.monotonic() - now
    assert own.call._wanted_at >= now and not own.call.has_read and ends == []


def test_a_rank_that_closes_files_after_an_error_of_all_is_waited_for(
    make: Make, ends: list[int], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(watchdog, "_PATIENT", 0.3)
    end = End(status=1, lines=["rank 5 ended alone: x", "y"], grace_seconds=0.3, is_shared=True)
    with make(2.0) as own:
        own.leaves()
        own.call.board.claim_end(end.encode())
        time.sleep(2)
    assert ends == [] and capfd.readouterr().err == ""
    with make(2.0) as own:
        own.call.board.claim_end(end.encode())
        time.sleep(1.5)
    assert ends == [1] and "rank 5 ended alone: x" in capfd.readouterr().err


@pytest.mark.parametrize("is_moving", [False, True])
def test_a_hang_is_told_as_what_it_is(
    is_moving: bool, make: Make, ends: list[int], capfd: pytest.CaptureFixture[str]
) -> None:
    with make(1.0) as own:
        (move if is_moving else time.sleep)(6)
        own.is_over = True
    assert ends == [86]
    err = capfd.readouterr().err
    assert ("Ranks move, but no step has ended for 4 s: " if is_moving else "Nothing has moved for 1 s: ") in err, err
    stacks = next(own.files.folder.rglob("rank-00000.txt")).read_text()
    assert "test_watchdog.py" in stacks


def test_an_error_of_the_watchdog_is_said_once_and_the_watch_goes_on(
    make: Make, ends: list[int], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with make(1.0) as own:
        for place, name in ((own, "_judge"), (own.call, "_look_for_readers")):
            monkeypatch.setattr(place, name, lambda: {}["x"])
        broken = time.monotonic()
        move(1)
        while own.call._answered <= broken:
            move(0.1)
        monkeypatch.undo()
    assert capfd.readouterr().err.count("has an error and goes on: KeyError: 'x'") == 2


def test_a_pause_that_computes_at_one_line_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    thread, stop, seen = TrainingThread("cpu"), threading.Event(), list[float]()

    def look() -> None:
        while not stop.wait(0.1):
            thread.look(60)
            seen.append(thread.still_seconds)

    thread.stepped(1, 0.1)
    thread.waits.begin("checkpoint")
    looking = threading.Thread(target=look)
    looking.start()
    hashlib.pbkdf2_hmac("sha256", b"x", b"y", 3_000_000)
    assert max(seen) < 0.6, seen
    time.sleep(1)
    stop.set()
    looking.join()
    assert seen[-1] > 0.6

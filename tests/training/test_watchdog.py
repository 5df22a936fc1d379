"""The watchdog of one process: what it must never end, and that it ends what hangs. Nothing is launched.

Where seconds decide, they are those of a clock that the test moves on: a busy machine changes nothing.
"""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from gpt4moe.parallel.environment import Environment
from gpt4moe.resilience.hangs import End, Limits
from gpt4moe.runlog.waits import Waits
from gpt4moe.training import roll_call, training_thread, watchdog
from gpt4moe.training.training_thread import TrainingThread
from gpt4moe.training.watchdog import Watchdog

Make = Callable[[float], Watchdog]


class Ends(list[int]):
    """Statuses. `over`: there is one."""

    def __init__(self) -> None:
        self.over = threading.Event()


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> Ends:
    """The statuses with which a watchdog would have ended this process; it ends its thread instead."""
    statuses = Ends()

    def end(status: int) -> None:
        statuses.append(status)
        statuses.over.set()
        raise SystemExit

    monkeypatch.setattr(os, "_exit", end)
    return statuses


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def of(hang_seconds: float) -> Watchdog:
        place = Environment(rank=0, world_size=1, local_rank=0, master=None, source="one process")
        made = Watchdog(place, Limits(hang_seconds=hang_seconds), tmp_path, "cpu")
        waits = Waits(watchdog.time.monotonic)
        waits.end()
        made.follow(waits, 5, None)
        made.stepped(6, 0.1)
        return made

    return of


def until(is_so: Callable[[], bool]) -> None:
    """Waits for what must come."""
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class Clock:
    """The seconds of the watchdog's files. `told`: how it would have begun to say that ranks hang."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now, self.told, self.told_at = 1000.0, list[str](), list[float]()
        self.computes = 0.0  # share of the time in which the training thread computes
        stands_still = SimpleNamespace(
            monotonic=lambda: self.now, clock_gettime=lambda clock: self.computes * self.now, strftime=time.strftime,
            pthread_getcpuclockid=time.pthread_getcpuclockid,
        )  # fmt: skip
        for module in (watchdog, roll_call, training_thread):
            monkeypatch.setattr(module, "time", stands_still)
        monkeypatch.setattr(Watchdog, "_tell", lambda own, beats, silent, what: self.tell(what))
        monkeypatch.setattr(Watchdog, "_tell_without_store", lambda own, still: self.tell("no store"))

    def tell(self, what: str) -> None:
        self.told.append(what)
        self.told_at.append(self.now)

    def passes(self, own: Watchdog, seconds: float, *, moves: bool) -> None:
        """What the watchdog's two threads do in so many seconds."""
        step = own.call.interval / 2
        for number in range(round(seconds / step)):
            self.now += step
            if number % 2:
                own.call.turn()
            if moves and number % 2:
                own.look(step)  # the training thread is this one, and stands at another line
            else:
                own.look(step)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_what_was_read_long_ago_says_nothing_of_a_step_that_stands_still(
    make: Make, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = make(6.0)  # patience 4 s, beats are wanted after 3 s
    monkeypatch.setattr(roll_call, "_ALL_IS_WELL_SECONDS", 0.2)
    clock.passes(own, 3, moves=True)
    readings = own.call.readings
    assert readings
    monkeypatch.setattr(roll_call, "_ALL_IS_WELL_SECONDS", 1000.0)
    own.stepped(7, 0.1)
    clock.passes(own, 4.5, moves=True)
    assert own.call.readings == readings
    own.stepped(8, 0.1)
    clock.passes(own, 4.5, moves=False)
    assert own.call.readings > readings, "the beats were wanted"
    own.stepped(9, 4.5)
    clock.passes(own, 0.75, moves=True)
    assert clock.told == []


def test_a_step_that_stands_still_is_told_at_its_limit(make: Make, clock: Clock) -> None:
    own = make(6.0)
    clock.passes(own, 7.5, moves=False)
    assert clock.told[0].startswith("Nothing has moved for ")
    assert 1004.5 <= clock.told_at[0] <= 1006.5, "the limit, less two beats: what is read may be so old"


def test_ranks_that_move_and_end_no_step_are_told_at_four_times_the_limit(make: Make, clock: Clock) -> None:
    own = make(6.0)
    clock.passes(own, 27, moves=True)
    assert clock.told[0] == "Ranks move, but no step has ended for 24 s" and clock.told_at[0] >= 1024.0


def test_a_save_or_evaluation_that_moves_is_not_ended_when_it_ends(make: Make, clock: Clock) -> None:
    own = make(1.5)
    own.thread.waits.begin("evaluation")
    clock.passes(own, 7, moves=True)  # 6 s are four times the limit of a step
    own.thread.waits.end()
    clock.passes(own, 1, moves=True)
    own.stepped(7, 0.2)
    assert clock.told == []


def test_each_pause_begins_to_count_anew(make: Make, clock: Clock) -> None:
    own = make(1.5)
    for number in range(30):  # always at the same line
        own.stepped(7 + number, 0.1)
        clock.passes(own, own.call.interval / 2, moves=False)
        assert own.thread.still_seconds <= own.call.interval / 2
    assert clock.told == []


def test_a_process_that_was_stopped_as_a_whole_hangs_not(make: Make, clock: Clock) -> None:
    own = make(1.5)
    clock.passes(own, 1.125, moves=False)
    assert own.call.has_read, "beats were wanted"
    clock.now += 100
    own.look(100.0)
    assert own.thread.still_seconds == 0 and not own.call.has_read
    own.call.turn()
    clock.passes(own, 1, moves=False)
    assert clock.told == []


def test_a_rank_that_closes_files_after_an_error_of_all_is_waited_for(
    make: Make, ends: Ends, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(watchdog, "_PATIENT", 0.3)
    end = End(rank=5, status=1, lines=["rank 5 ended alone: x", "y"], grace_seconds=0.3, is_shared=True)
    with make(2.0) as own:
        own.leaves()
        own.call.board.claim_end(end.encode())
        until(lambda: own.call.end is not None)
        time.sleep(1)
    assert ends == [] and capfd.readouterr().err == ""
    with make(2.0) as own:
        own.call.board.claim_end(end.encode())
        ends.over.wait(60)
    assert ends == [1] and "rank 5 ended alone: x" in capfd.readouterr().err


def test_of_two_ranks_that_find_the_same_one_says_it(make: Make, ends: Ends, capfd: pytest.CaptureFixture[str]) -> None:
    """Rank 0 and the first that looks for the lost both read all beats, and say the same of them."""
    for first, says in ((1, ""), (0, "error: rank 2 is lost\n")):
        with make(2.0) as own:
            own.call.board.claim_end(End(rank=first, status=86, lines=["rank 2 is lost"]).encode())
            assert own._claim(End(rank=own.rank, status=86, lines=["rank 2 is lost"])).rank == first
        assert capfd.readouterr().err == says
    assert ends == []


def test_a_hang_ends_the_rank_with_its_stacks(make: Make, ends: Ends, capfd: pytest.CaptureFixture[str]) -> None:
    with make(0.5) as own:
        ends.over.wait(60)  # one place
        own.is_over = True
    assert ends == [86]
    err = capfd.readouterr().err
    assert "Nothing has moved for " in err and "test_watchdog.py" in err, err
    assert "test_watchdog.py" in next(own.files.folder.rglob("rank-00000.txt")).read_text()


def test_an_error_of_the_watchdog_is_said_once_and_the_watch_goes_on(
    make: Make, ends: Ends, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    calls = dict.fromkeys(("_judge", "_look_for_readers"), 0)

    def broken(name: str) -> Callable[[], None]:
        def call() -> None:
            calls[name] += 1
            raise KeyError("x")

        return call

    with make(0) as own:
        for place, name in ((own, "_judge"), (own.call, "_look_for_readers")):
            monkeypatch.setattr(place, name, broken(name))
        began = time.monotonic()
        until(lambda: min(calls.values()) > 1 and own.call._answered > began)
    assert capfd.readouterr().err.count("has an error and goes on: KeyError: 'x'") == 2
    assert ends == []


@pytest.mark.parametrize(("share", "moves"), [(0.02, True), (0.005, False)])
def test_a_pause_that_computes_at_one_line_moves(share: float, moves: bool, make: Make, clock: Clock) -> None:
    own = make(6.0)
    own.thread.waits.begin("checkpoint")
    clock.computes = share
    clock.passes(own, 30, moves=False)  # four times the limit of a step, and more
    assert clock.told == [] if moves else clock.told


def test_what_it_computes_is_that_of_the_training_thread() -> None:
    thread, other = TrainingThread("cpu"), list[float]()
    before, began = time.clock_gettime(thread._clock), time.thread_time()

    def read() -> None:
        other.append(time.clock_gettime(thread._clock))

    while time.thread_time() < began + 0.02:
        pass
    reader = threading.Thread(target=read)
    reader.start()
    reader.join()
    assert other[0] - before >= 0.02


def test_a_disk_that_takes_no_alert_does_not_stop_the_watch(make: Make, clock: Clock) -> None:
    own, answers, written = make(6.0), threading.Event(), list[str]()
    own.events = SimpleNamespace(write=lambda kind, **fields: (answers.wait(30), written.append(kind)))  # type: ignore[assignment]
    clock.passes(own, 7.5, moves=False)
    assert clock.told and written == []
    answers.set()
    until(lambda: written == ["alert"])

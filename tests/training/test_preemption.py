"""A signal: the step in work is finished and saved, every rank exits with 85, and a restart goes on."""

import signal
from pathlib import Path

import pytest

from tests.training.command import Event, metrics, saved_state, train

TEN = ("training.steps=10", "checkpoint.every=5", "checkpoint.keep=0")


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
def test_a_signal_saves_exits_85_and_the_restart_equals_a_run_never_stopped(
    number: signal.Signals, tmp_path: Path, whole_run: Path
) -> None:
    folder = tmp_path / "x"
    (ended,) = train(folder, *TEN, events=(Event(after_step=2, sent=number),))
    assert (ended.status, ended.err) == (85, "")
    assert f"{number.name} received: saving step 3" in ended.out
    assert saved_state(folder, 3)
    assert metrics(folder) == metrics(whole_run)[:3]

    (again,) = train(folder, *TEN)
    assert again.status == 0, again.err
    assert metrics(folder) == metrics(whole_run)
    assert saved_state(folder, 10) == saved_state(whole_run, 10)


def test_a_signal_to_one_rank_stops_all(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    ended = train(folder, *TEN, "parallel.pp=2", ranks=2, events=(Event(after_step=2, rank=1, sent=signal.SIGTERM),))
    assert [rank.status for rank in ended] == [85, 85]
    assert metrics(folder)[-1]["step"] == 3
    assert sorted(saved_state(folder, 3)) == ["rank-00000.safetensors", "rank-00001.safetensors"]
    assert "SIGTERM received" in ended[0].out and ended[1].out == ""


def test_two_signals_in_one_step_are_one_stop(tmp_path: Path) -> None:
    events = tuple(Event(after_step=2, sent=number) for number in (signal.SIGUSR1, signal.SIGTERM))
    assert train(tmp_path / "x", *TEN, events=events)[0].status == 85
    assert metrics(tmp_path / "x")[-1]["step"] == 3


def test_usr1_saves_now_and_training_goes_on(tmp_path: Path, whole_run: Path) -> None:
    folder = tmp_path / "x"
    (ended,) = train(folder, *TEN, events=(Event(after_step=2, sent=signal.SIGUSR1),))
    assert (ended.status, ended.err) == (0, "")
    assert "SIGUSR1 received: saving step 3, then going on" in ended.out
    assert saved_state(folder, 3) and not (folder / "checkpoints" / "step-00000004").exists()
    assert metrics(folder) == metrics(whole_run)


def test_a_signal_in_the_last_step_finds_the_run_done(tmp_path: Path) -> None:
    event = Event(after_step=2, sent=signal.SIGUSR2)
    (ended,) = train(tmp_path / "x", "training.steps=3", events=(event,))
    assert ended.status == 0, "nothing is left to do: a requeue would be for nothing"
    assert saved_state(tmp_path / "x", 3)

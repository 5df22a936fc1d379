"""A signal: the step in work is finished and saved, every rank exits with 85, and a restart goes on."""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from gpt4moe.training.callbacks import report_files
from gpt4moe.training.state import TrainingContext
from tests.training.command import SMALL, Event, metrics, outside, saved_state, train

TEN = ("training.steps=10", "checkpoint.every=5", "checkpoint.keep=0")


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGUSR2, 85), (signal.SIGTERM, 85), (signal.SIGHUP, 85), (signal.SIGINT, 130)]
)
def test_a_signal_saves_ends_and_the_restart_equals_a_run_never_stopped(
    number: signal.Signals, status: int, tmp_path: Path, whole_run: Path
) -> None:
    folder = tmp_path / "x"
    (ended,) = train(folder, *TEN, events=(Event(after_step=2, sent=number),))
    assert (ended.status, ended.err) == (status, "")
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


@pytest.mark.parametrize("status", [85, 0])
def test_what_decorates_a_saved_run_does_not_change_its_status(status: int, tmp_path: Path) -> None:
    folder = tmp_path / "x"
    for name in ("loss.png", "expert_load.json", "wire.json"):
        (folder / name).mkdir(parents=True)  # a folder where a file should be
    events = (Event(after_step=1, sent=signal.SIGUSR2),) if status else ()
    ended = train(folder, "training.steps=3", "parallel.tp=2", ranks=2, events=events)
    assert [(rank.status, rank.err) for rank in ended] == [(status, "")] * 2
    assert saved_state(folder, 2 if status else 3)
    assert "loss.png and report.html failed, the run goes on: IsADirectoryError" in ended[0].out


@pytest.mark.parametrize(("stopped", "is_left_alone"), [("SIGUSR2", True), (None, False)])
def test_a_warned_run_leaves_a_slow_report_alone(
    stopped: str | None, is_left_alone: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, written = threading.Event(), threading.Event()
    monkeypatch.setattr(report_files, "REPORT_SECONDS", 0.05)

    def write(folder: Path) -> Path:
        go_on.wait(60 if is_left_alone else 0.2)
        written.set()
        return folder

    @contextmanager
    def pause(kind: str) -> Iterator[None]:
        yield
        assert written.is_set() is not is_left_alone

    context = SimpleNamespace(
        groups=SimpleNamespace(is_first_rank=True), state=SimpleNamespace(step=3), stop_requested=stopped,
        folder=SimpleNamespace(path=tmp_path), pause=pause,
    )  # fmt: skip
    report_files.Report(write).on_end(cast(TrainingContext, context))
    go_on.set()


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
def test_a_signal_in_the_first_moments_kills_no_rank(number: signal.Signals, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gpt4moe.train", *SMALL, f"run.root={tmp_path}", "run.name=x"]
    rank = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=outside(), cwd=Path(__file__).parents[2])
    deadline = time.monotonic() + 120
    while not is_caught(rank.pid, number):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    rank.send_signal(signal.SIGUSR1)  # noted: its first step is saved
    time.sleep(0.3)
    assert rank.poll() is None
    rank.send_signal(number)
    told, _ = rank.communicate(timeout=120)
    assert rank.returncode == 85
    assert told == f"{number.name} received before training began: nothing new to save, ending.\n"
    assert not (tmp_path / "x" / "checkpoints").exists()


def test_a_second_ctrl_c_leaves_at_once_but_not_the_second_signal_of_one_press() -> None:
    code = (
        "import os, signal, time, types; from gpt4moe.resilience import signals; notes = signals.SignalNotes()\n"
        "now = 5.0; signals.time = types.SimpleNamespace(monotonic=lambda: now)\n"
        "notes.note(); os.kill(os.getpid(), signal.SIGINT); now += 0.9; os.kill(os.getpid(), signal.SIGINT)\n"
        "assert notes.take() == len(signals.SIGNALS); print('noted', flush=True)\n"
        "now += 0.11; os.kill(os.getpid(), signal.SIGINT); time.sleep(60)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=50, check=False, env=outside()
    )
    assert (ended.returncode, ended.stderr) == (130, "")
    assert ended.stdout.splitlines() == ["noted", "A second Ctrl-C: leaving at once, what was saved is whole."]


def test_what_is_ignored_from_the_start_stays_ignored() -> None:
    code = (
        "import os, signal; from gpt4moe.resilience.signals import SignalNotes\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN); notes = SignalNotes()\n"
        "notes.listen(); notes.note(); os.kill(os.getpid(), signal.SIGHUP); assert notes.take() == 0"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=outside())


def is_caught(pid: int, number: int) -> bool:
    """Whether the process has a handler of its own for the signal."""
    (mask,) = [line.split()[1] for line in Path(f"/proc/{pid}/status").read_text().splitlines() if "SigCgt" in line]
    return bool(int(mask, 16) & 1 << number - 1)

"""Scores from outside the model: a checker given as `module:function`, or a command. Each has a time limit.

A scorer that fails ends the command with one line of cause and one of cure. What was scored before is in the trace, and
the same command goes on there.
"""

import json
import math
import os
import re
import selectors
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Protocol

from gpt4moe.errors import ConfigError
from gpt4moe.refinement.tasks import Task

START_SECONDS = 120.0
"""For a checker's imports; torch alone may take ten."""
MOST_BYTES = 1 << 20
"""That a scorer may print: a number, and what the user should see."""
LINE_SECONDS = 5.0
"""For a checker that hangs to say where, at most: on a busy machine a signal may take a while."""
_LOOK_SECONDS = 0.05
_PLACE = re.compile(r'File "(.*)", line (\d+) in (.*)\n')
"""Of a line of faulthandler's; the innermost call comes first."""
KILL_SECONDS = 10.0
"""A killed process may be waiting for a disk; our own end does not wait for it any longer."""


class OutsideScorer(Protocol):
    """Higher scores are better."""

    def score(self, task: Task, text: str) -> float:
        """Raises: ConfigError when the scorer fails, takes too long, or gives no finite number."""

    def close(self) -> None:
        """Ends its processes."""


class CommandScorer:
    """A command, started for each text: {"task": {...}, "text": "..."} on stdin, a number on stdout."""

    def __init__(self, command: str, seconds: float):
        self.command, self.seconds = command, seconds
        self.words = shlex.split(command)

    def score(self, task: Task, text: str) -> float:
        try:
            process = _start(self.words)
        except OSError as error:
            raise ConfigError(
                f"The scorer {self.command!r} cannot be started: {error.strerror}.", "Give a command that is there."
            ) from error
        end, printed = time.monotonic() + self.seconds, (b"", b"")
        try:
            printed = _exchange(process, _asked(task, text), end, is_line=False)
            process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired as error:
            raise _too_slow(self.command, task, self.seconds, _said_last(error.stderr or printed[1])) from error
        except _TooLong as error:
            raise _failed(self.command, task, str(error)) from error
        finally:
            # The whole session, so that no child of the command stays.
            _kill(process)
        out, err = (some.decode(errors="replace") for some in printed)
        if process.returncode:
            last = (err.strip().splitlines() or ["it printed nothing"])[-1]
            raise _failed(self.command, task, f"exit status {process.returncode}: {last}")
        try:
            return _finite(float(out), self.command, task)
        except ValueError as error:
            raise _failed(self.command, task, f"it printed {out[:60]!r}, no number") from error

    def close(self) -> None:
        return


class CheckerScorer:
    """A function (task, text) -> number, in a process of its own (checker.py) that lives as long as this.

    Raises: ConfigError when it cannot be imported.
    """

    def __init__(self, name: str, seconds: float):
        self.name, self.seconds = name, seconds
        self.num_shown = 0
        """Bytes of what it printed that went to our stderr."""
        self.number = 0
        """Of what is asked: an answer has the same one."""
        root = str(Path(__file__).resolve().parents[2])
        paths = [path for path in (os.environ.get("PYTHONPATH"), root) if path]
        self.process = _start(
            [sys.executable, str(Path(__file__).with_name("checker.py")), name],
            os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        )
        self.was_at = ""
        """What it did when its time was over."""
        answer = self._ask(b"", START_SECONDS)
        if "error" in (answer or {"error": ""}):
            self.close()
            why = answer["error"] if answer else f"no answer in {START_SECONDS:g} s{self.was_at}"
            raise ConfigError(
                f"The checker {name} cannot be imported: {why}.",
                "Give --scorer module:function of a module in this folder or on PYTHONPATH.",
            )

    def score(self, task: Task, text: str) -> float:
        self.number += 1
        answer = self._ask(_asked(task, text, number=self.number), self.seconds)
        if answer is None:
            self.close()
            raise _too_slow(self.name, task, self.seconds, self.was_at)
        if "error" in answer:
            raise _failed(self.name, task, answer["error"])
        return _finite(answer["score"], self.name, task)

    def _ask(self, asked: bytes, seconds: float) -> dict[str, Any] | None:
        """Its answer; None: not within the time."""
        try:
            line, printed = _exchange(self.process, asked, time.monotonic() + seconds, is_line=True)
        except subprocess.TimeoutExpired:
            self.was_at = self._line()
            return None
        except _TooLong as error:
            return {"error": str(error)}
        self._show(printed)
        if not line.endswith(b"\n"):
            return {"error": "its process has ended"}
        try:
            found: dict[str, Any] = json.loads(line)
            if found["number"] != self.number:
                raise ValueError(line)
        except (ValueError, TypeError, KeyError, RecursionError):
            # Its own code wrote to the file descriptor that checker.py answers on.
            return {"error": f"its process wrote {line[:60]!r} where its score belongs"}
        return found

    def _line(self) -> str:
        """Which line it is at, of its own words (checker.py); empty: it does not say."""
        self.process.send_signal(signal.SIGUSR1)
        said, end = b"", time.monotonic() + LINE_SECONDS
        while time.monotonic() < end:
            try:
                _exchange(self.process, b"", time.monotonic() + _LOOK_SECONDS, is_line=True)
            except subprocess.TimeoutExpired as error:
                said = (said + (error.stderr or b""))[-MOST_BYTES:]
            except _TooLong:
                return ""
            else:
                return ""  # it answers after all, or has ended
            found = _PLACE.search(said.decode(errors="replace"))
            if found:
                return f": it is at line {found[2]} of {found[1]}, in {found[3]}"
        return ""

    def _show(self, printed: bytes) -> None:
        """What a checker prints is for the user's eyes: on stderr, up to MOST_BYTES in all."""
        shown = printed[: max(0, MOST_BYTES - self.num_shown)]
        self.num_shown += len(shown)
        sys.stderr.write(shown.decode(errors="replace"))

    def close(self) -> None:
        _kill(self.process)


class _TooLong(Exception):
    """A scorer printed more than MOST_BYTES."""


def _start(words: Sequence[str], env: Mapping[str, str] | None = None) -> "subprocess.Popen[bytes]":
    process = subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0, env=env,
        start_new_session=True,
    )  # fmt: skip
    for pipe in _pipes(process):
        os.set_blocking(pipe.fileno(), False)
    return process


def _pipes(process: "subprocess.Popen[bytes]") -> "list[IO[bytes]]":
    assert process.stdin and process.stdout and process.stderr
    return [process.stdin, process.stdout, process.stderr]


def _exchange(process: "subprocess.Popen[bytes]", data: bytes, end: float, *, is_line: bool) -> tuple[bytes, bytes]:
    """Gives a process its input and reads what it prints: (stdout, the last of stderr).

    Args:
        end: of time.monotonic().
        is_line: until there is a line, and its stdin stays open; otherwise until it has closed stdout and stderr.
    Raises: TimeoutExpired, with the last of stderr, when it is not done then; _TooLong.
    """
    given, out, err = _pipes(process)
    found = {out: bytearray(), err: bytearray()}
    reading = {out, err}
    with selectors.DefaultSelector() as selector:
        if data:
            selector.register(given, selectors.EVENT_WRITE)
        for pipe in reading:
            selector.register(pipe, selectors.EVENT_READ)
        while reading and not (is_line and (out not in reading or found[out].endswith(b"\n"))):
            ready = selector.select(max(0.0, end - time.monotonic()))
            if not ready or time.monotonic() > end:
                raise subprocess.TimeoutExpired(process.args, 0, stderr=bytes(found[err]))
            for pipe in [one for one in (given, out, err) if any(key.fileobj is one for key, _ in ready)]:
                if pipe is given:
                    data = _written(given, data)
                    if not data:
                        selector.unregister(given)
                        if not is_line:
                            given.close()
                elif piece := _read(pipe):
                    found[pipe] += piece
                elif piece == b"":
                    selector.unregister(pipe)
                    reading.discard(pipe)
            if len(found[out]) > MOST_BYTES:
                raise _TooLong(f"it printed more than {MOST_BYTES:,} bytes")
            del found[err][:-MOST_BYTES]
    if is_line:
        found[err] += _read(err) or b""  # what it printed last
    return bytes(found[out]), bytes(found[err])


def _read(pipe: IO[bytes]) -> bytes | None:
    """What is there; empty: the other end is closed; None: nothing yet."""
    try:
        return os.read(pipe.fileno(), 65536)
    except BlockingIOError:
        return None


def _written(pipe: IO[bytes], data: bytes) -> bytes:
    """What is left to write; nothing when the process reads no more."""
    try:
        return data[os.write(pipe.fileno(), data) :]
    except BlockingIOError:
        return data
    except BrokenPipeError:
        return b""


def _asked(task: Task, text: str, **more: int) -> bytes:
    return json.dumps({"task": task.fields, "text": text, **more}).encode() + b"\n"


def _kill(process: "subprocess.Popen[bytes]") -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        process.wait(KILL_SECONDS)
    for pipe in _pipes(process):
        pipe.close()


def _finite(score: float, name: str, task: Task) -> float:
    if not math.isfinite(score):
        raise _failed(name, task, f"its score is {score}")
    return score


def _failed(name: str, task: Task, why: str) -> ConfigError:
    return ConfigError(
        f"The scorer {name!r} failed at task {task.id!r}: {why}.",
        "Mend it and give the same command again: it goes on behind the last line of the trace.",
    )


def _said_last(err: bytes) -> str:
    last = err.decode(errors="replace").strip().splitlines()[-1:]
    return f": it said last {last[0][:200]!r}" if last else ", and said nothing on stderr"


def _too_slow(name: str, task: Task, seconds: float, was_at: str) -> ConfigError:
    return ConfigError(
        f"The scorer {name!r} gave task {task.id!r} no score in {seconds:g} s{was_at}.",
        "Mend it or raise --scorer-seconds, and give the same command again: it goes on behind the last line.",
    )

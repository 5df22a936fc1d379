"""Scores from outside the model: a checker given as `module:function`, or a command. Each has a time limit.

A scorer that fails ends the command with one line of cause and one of cure. What was scored before is in the trace, and
the same command goes on there.
"""

import json
import math
import os
import selectors
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from gpt4moe.errors import ConfigError
from gpt4moe.refinement.tasks import Task

START_SECONDS = 120.0
"""For a checker's imports; torch alone may take ten."""


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
            process = subprocess.Popen(
                self.words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise ConfigError(
                f"The scorer {self.command!r} cannot be started: {error.strerror}.", "Give a command that is there."
            ) from error
        try:
            out, err = process.communicate(_asked(task, text), timeout=self.seconds)
        except subprocess.TimeoutExpired as error:
            # The whole session, so that no child of the command stays.
            _kill(process)
            raise _too_slow(self.command, task, self.seconds) from error
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
        root = str(Path(__file__).resolve().parents[2])
        paths = [path for path in (os.environ.get("PYTHONPATH"), root) if path]
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("checker.py")), name], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, start_new_session=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        )  # fmt: skip
        answer = self._read(START_SECONDS)
        if "error" in (answer or {"error": ""}):
            self.close()
            raise ConfigError(
                f"The checker {name} cannot be imported: "
                f"{answer['error'] if answer else f'no answer in {START_SECONDS:g} s'}.",
                "Give --scorer module:function of a module in this folder or on PYTHONPATH.",
            )

    def score(self, task: Task, text: str) -> float:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(_asked(task, text).encode() + b"\n")
            self.process.stdin.flush()
            answer = self._read(self.seconds)
        except OSError:
            answer = {"error": "its process has ended"}
        if answer is None:
            self.close()
            raise _too_slow(self.name, task, self.seconds)
        if "error" in answer:
            raise _failed(self.name, task, answer["error"])
        return _finite(answer["score"], self.name, task)

    def _read(self, seconds: float) -> dict[str, Any] | None:
        """The next answer; None: not within the time."""
        assert self.process.stdout is not None
        end, line = time.monotonic() + seconds, b""
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                if not selector.select(max(0.0, end - time.monotonic())):
                    return None
                piece = os.read(self.process.stdout.fileno(), 65536)
                if not piece:
                    return {"error": "its process has ended"}
                line += piece
        found: dict[str, Any] = json.loads(line)
        return found

    def close(self) -> None:
        _kill(self.process)


def _asked(task: Task, text: str) -> str:
    return json.dumps({"task": task.fields, "text": text})


def _kill(process: "subprocess.Popen[Any]") -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            with suppress(BrokenPipeError):
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


def _too_slow(name: str, task: Task, seconds: float) -> ConfigError:
    return ConfigError(
        f"The scorer {name!r} gave task {task.id!r} no score in {seconds:g} s.",
        "Mend it or raise --scorer-seconds, and give the same command again: it goes on behind the last line.",
    )

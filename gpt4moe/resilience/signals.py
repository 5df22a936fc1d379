"""What signals do to a rank. USR1: save and go on. HUP, USR2, TERM, INT: save and end. Without a handler each would
kill it.

    listen()   before training       USR1 is noted; the others end the rank: there is nothing new to save
    note()     during training       all are noted; the ranks agree on them after each step (training.callbacks.saving)
    ignore()   after the last save   else Python's exit would restore the default handlers, which kill the rank

Ctrl-C is INT. The first saves; a second one that comes a second later or more leaves at once. A rank that is to ignore
HUP (nohup) or INT (a shell's background job) from its first moment on goes on ignoring it.

end_on_signals() is for commands that force every result to disk as soon as they have it: they may end at any moment.

No torch: train.py imports this file before anything that takes seconds.
"""

import os
import signal
import time
from collections.abc import Callable
from types import FrameType

from gpt4moe.errors import INTERRUPTED
from gpt4moe.parallel.environment import SAME_PRESS_SECONDS
from gpt4moe.parallel.slurm_job import SlurmJob

REQUEUE = 85
"""Exit status: saved, please requeue."""
SIGNALS = (signal.SIGUSR1, signal.SIGHUP, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
"""The weakest first. Of several signals the strongest counts, so that one which ends the run wins."""


def end_status(name: str) -> int:
    """The exit status of a rank that the signal of this name ended."""
    return INTERRUPTED if name == signal.SIGINT.name else REQUEUE


def end_on_signals() -> None:
    """From now on each of SIGNALS but Ctrl-C ends this process at once with 85. No exception: a library might catch
    it."""
    for number in _heard():
        if number != signal.SIGINT:
            signal.signal(number, lambda number, frame: os._exit(REQUEUE))


def _heard() -> list[signal.Signals]:
    """SIGNALS without HUP and INT where whoever started this process has it ignore them."""
    optional = (signal.SIGHUP, signal.SIGINT)
    return [it for it in SIGNALS if it not in optional or signal.getsignal(it) is not signal.SIG_IGN]


class SignalNotes:
    """The signals that this process received and the run has not acted on yet."""

    def __init__(self) -> None:
        self._received: list[int] = []
        self._interrupted: float | None = None
        """When Ctrl-C first came, by time.monotonic()."""
        self.before_leaving: Callable[[str], None] = lambda name: None
        """Called with the signal's name right before a signal ends a rank that does not train yet."""

    def listen(self) -> None:
        for number in _heard():
            signal.signal(number, self._note if number == signal.SIGUSR1 else self._leave)

    def note(self) -> None:
        for number in _heard():
            signal.signal(number, self._note)

    def ignore(self) -> None:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def take(self) -> int:
        """The strongest signal since the last call: its place in SIGNALS, counted from 1; 0 for none."""
        heard = self._received[:]
        del self._received[: len(heard)]  # a signal that arrives now stays for the next call
        return max((SIGNALS.index(signal.Signals(number)) + 1 for number in heard), default=0)

    def again(self, number: int) -> None:
        """As if the signal came once more: what it asked for was not done."""
        self._received.append(number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received.append(number)
        if number == signal.SIGINT and self._interrupted is None:
            self._interrupted = time.monotonic()
        elif self._is_second_press(number):
            _say("A second Ctrl-C: leaving at once, what was saved is whole.")
            os._exit(INTERRUPTED)

    def _is_second_press(self, number: int) -> bool:
        # torchrun's agent hands on the first INT, and sends TERM at the second.
        leaves = number in (signal.SIGINT, signal.SIGTERM) and self._interrupted is not None
        return leaves and time.monotonic() - (self._interrupted or 0.0) > SAME_PRESS_SECONDS

    def _leave(self, number: int, frame: FrameType | None) -> None:
        """Ends the process at once. An exception could be caught by a module that is being imported."""
        name = signal.Signals(number).name
        _say(f"{name} received before training began: nothing new to save, ending.")
        self.before_leaving(name)
        os._exit(end_status(name))


def _say(text: str) -> None:
    """Prints a line from the first rank, within a handler."""
    if os.environ.get("RANK", SlurmJob.read().task or "0") == "0":
        os.write(1, f"{text}\n".encode())

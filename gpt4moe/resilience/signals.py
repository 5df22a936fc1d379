"""What signals do to a rank. USR1: save and go on. USR2, TERM: save and end. Without a handler each would kill it.

    listen()   before training       USR1 is noted; USR2 and TERM end the rank with 85: there is nothing new to save
    note()     during training       all are noted; the ranks agree on them after each step (training.callbacks.saving)
    ignore()   after the last save   else Python's exit would restore the default handlers, which kill the rank

end_on_signals() is for commands that force every result to disk as soon as they have it: they may end at any moment.

No torch: train.py imports this file before anything that takes seconds.
"""

import os
import signal
from collections.abc import Callable
from types import FrameType

from gpt4moe.parallel.slurm_job import SlurmJob

REQUEUE = 85
"""Exit status: saved, please requeue."""
SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
"""In ascending numbers. Of several signals the highest number counts, so that one which ends the run wins."""


def end_on_signals() -> None:
    """From now on each of SIGNALS ends this process at once with 85. No exception: a library might catch it."""
    for number in SIGNALS:
        signal.signal(number, lambda number, frame: os._exit(REQUEUE))


class SignalNotes:
    """The signals that this process received and the run has not acted on yet."""

    def __init__(self) -> None:
        self._received: list[int] = []
        self.before_leaving: Callable[[str], None] = lambda name: None
        """Called with the signal's name right before USR2 or TERM ends a rank that does not train yet."""

    def listen(self) -> None:
        signal.signal(signal.SIGUSR1, self._note)
        for number in (signal.SIGUSR2, signal.SIGTERM):
            signal.signal(number, self._leave)

    def note(self) -> None:
        for number in SIGNALS:
            signal.signal(number, self._note)

    def ignore(self) -> None:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def take(self) -> int:
        """The strongest signal since the last call; 0 for none."""
        heard = self._received[:]
        del self._received[: len(heard)]  # a signal that arrives now stays for the next call
        return max(heard, default=0)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received.append(number)

    def _leave(self, number: int, frame: FrameType | None) -> None:
        """Ends the process at once. An exception could be caught by a module that is being imported."""
        name = signal.Signals(number).name
        if os.environ.get("RANK", SlurmJob.read().task or "0") == "0":
            os.write(1, f"{name} received before training began: nothing new to save, ending.\n".encode())
        self.before_leaving(name)
        os._exit(REQUEUE)

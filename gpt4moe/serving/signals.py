"""Ctrl-C and TERM end the server: rank 0 says so to the others in its next message, and all leave together.

A rank may be blocked inside a collective whose other end has died, where Python runs no signal handler. So the number
of a signal goes to a pipe (signal.set_wakeup_fd), and a thread reads it.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from gpt4moe.runlog.command_line import print_error

GRACE_SECONDS = 10.0
"""From the signal to the end by force. torchrun kills after 30."""


@contextmanager
def ended_by_signal(close: Callable[[], None], *, speaks: bool) -> Iterator[None]:
    """Calls `close` in another thread on INT or TERM. If the work inside still goes on after GRACE_SECONDS, the process
    ends with status 2. From the main thread only.

    Args:
        speaks: whether this rank prints why it ended by force.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    has_ended = threading.Event()

    def watch() -> None:
        if not os.read(reader, 1) or has_ended.is_set():
            return
        close()
        if not has_ended.wait(GRACE_SECONDS):
            if speaks:
                print_error(
                    f"The ranks of the server did not end within {GRACE_SECONDS:.0f} s: one has probably died.",
                    "See what the other ranks printed last; then start the server again.",
                )
            os._exit(2)

    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    old = signal.set_wakeup_fd(writer)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        has_ended.set()
        signal.set_wakeup_fd(old)
        os.close(writer)  # ends the watcher
        watcher.join()
        os.close(reader)
        for number, handler in before.items():
            signal.signal(number, handler)

"""The bar of commands that read or write many bytes. A file of its own: Hydra, which command.py needs, loads slowly."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

_EVERY_SECONDS = 60.0


@contextmanager
def byte_bar(name: str, total: int) -> Iterator[Callable[[int], None]]:
    """Bytes, MB/s and the time that is left, on stderr: a bar on a terminal, in a log a line a minute. Gives a function
    to call with the bytes that were just done."""
    named, bar = TextColumn("{task.description}"), BarColumn()
    columns = (named, bar, DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    if not console.is_terminal:  # there a bar's last state would stand before an error's two lines
        yield ProgressLines(name, total, lambda line: console.print(line, markup=False, soft_wrap=True)).advance
        return
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(name, total=total)
        yield lambda amount: progress.advance(task, amount)


@dataclass(slots=True)
class ProgressLines:
    """Progress as lines, for a log: none for work of less than a minute."""

    name: str
    total: int
    say: Callable[[str], None]
    clock: Callable[[], float] = time.monotonic
    done: int = 0
    said: tuple[float, int] = field(init=False)
    """When the last line was said, and what was done then. The rate is that since: work of before a restart, which is
    done at once, is in no later line."""

    def __post_init__(self) -> None:
        self.said = self.clock(), 0

    def advance(self, amount: int) -> None:
        """Says a line when a minute has passed since the last one."""
        self.done += amount
        now, (before, done_before) = self.clock(), self.said
        if now - before < _EVERY_SECONDS:
            return
        rate, self.said = (self.done - done_before) / (now - before), (now, self.done)
        left = f", {(self.total - self.done) / rate / 60:.0f} min left" if rate and self.done <= self.total else ""
        self.say(f"{self.name}: {self.done / 1e6:,.0f} of {self.total / 1e6:,.0f} MB, {rate / 1e6:.1f} MB/s{left}")

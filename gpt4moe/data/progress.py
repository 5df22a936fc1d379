"""The bar of commands that read or write many bytes. A file of its own: Hydra, which command.py needs, loads slowly."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn


@contextmanager
def byte_bar(name: str, total: int) -> Iterator[Callable[[int], None]]:
    """Bytes, MB/s and the time that is left, on stderr. Gives a function to call with the bytes that were just done."""
    named, bar = TextColumn("{task.description}"), BarColumn()
    columns = (named, bar, DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    # Where nobody watches, its last state would stand before an error's two lines.
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(name, total=total)
        yield lambda amount: progress.advance(task, amount)

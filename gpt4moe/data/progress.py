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
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(name, total=total)
        yield lambda amount: progress.advance(task, amount)

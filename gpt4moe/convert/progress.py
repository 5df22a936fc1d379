"""A bar on stderr with bytes done and GB/s, for conversions that take minutes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

Advance = Callable[[int], None]
"""Is told how many bytes were written since it was told last."""


@contextmanager
def progress_bar(what: str, total_bytes: int) -> Iterator[Advance]:
    """Nothing is drawn where stderr is no terminal."""
    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}", markup=False), BarColumn(bar_width=None), DownloadColumn(),
        TransferSpeedColumn(), TimeRemainingColumn(), console=console, disable=not console.is_terminal,
    ) as progress:  # fmt: skip
        task = progress.add_task(what, total=total_bytes)
        yield lambda size: progress.advance(task, size)


def silent(size: int) -> None:
    """No bar."""

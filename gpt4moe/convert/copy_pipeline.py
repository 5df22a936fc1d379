"""Copies large tensors: one thread reads while another casts, hashes and writes. Also a progress bar. No torch.

    reading thread   take -> fill -> put      writing thread   work(chunk) -> the buffer is free again

numpy, xxhash and file writes release the interpreter's lock on blocks of this size.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from threading import Thread
from types import TracebackType

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

CHUNK_ELEMENTS = 2**20  # 4 MiB of fp32
_DEPTH = 8  # buffers that may wait while the disk is busy


class CopyPipeline:
    """The buffers and the writing thread for one file.

    Args:
        work: called with every chunk, in order, in the writing thread.
    Raises: the exception of `work`, in `take` or on exit. Later chunks are discarded.
    """

    def __init__(self, work: Callable[[np.ndarray], None]):
        self._work = work
        self._problem: BaseException | None = None
        self._free: SimpleQueue[np.ndarray] = SimpleQueue()
        self._full: SimpleQueue[np.ndarray | None] = SimpleQueue()
        for _ in range(_DEPTH):
            self._free.put(np.empty(CHUNK_ELEMENTS, dtype=np.float32))
        self._thread = Thread(target=self._run, name="copy", daemon=True)

    def take(self) -> np.ndarray:
        """A free buffer of CHUNK_ELEMENTS; waits until there is one."""
        buffer = self._free.get()
        if self._problem is not None:
            raise self._problem
        return buffer

    def put(self, chunk: np.ndarray) -> None:
        """Gives a chunk to the writing thread: the first elements of a buffer from `take`."""
        self._full.put(chunk)

    def __enter__(self) -> "CopyPipeline":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._full.put(None)
        self._thread.join()
        if self._problem is not None and error is None:
            raise self._problem

    def _run(self) -> None:
        while (chunk := self._full.get()) is not None:
            if self._problem is None:
                try:
                    self._work(chunk)
                except BaseException as error:  # raised again in the reading thread
                    self._problem = error
            self._free.put(chunk if chunk.base is None else chunk.base)  # the buffer that the chunk is a part of


Advance = Callable[[int], None]
"""Called with the number of bytes written since the last call."""


@contextmanager
def progress_bar(what: str, total_bytes: int) -> Iterator[Advance]:
    """A progress bar on stderr with bytes done and GB/s. No bar if stderr is no terminal."""
    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}", markup=False), BarColumn(bar_width=None), DownloadColumn(),
        TransferSpeedColumn(), TimeRemainingColumn(), console=console, disable=not console.is_terminal,
    ) as progress:  # fmt: skip
        task = progress.add_task(what, total=total_bytes)
        yield lambda size: progress.advance(task, size)

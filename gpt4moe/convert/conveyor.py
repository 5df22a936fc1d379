"""Conveyor: one thread reads, another casts, hashes and writes, so that disk and processor are both busy. No torch.

    reading thread   take -> fill -> put      writing thread   work(chunk) -> the buffer is free again

numpy, xxhash and file writes let go of the interpreter's lock on blocks of this size.
"""

from collections.abc import Callable
from queue import SimpleQueue
from threading import Thread
from types import TracebackType

import numpy as np

CHUNK_ELEMENTS = 2**20  # 4 MiB of fp32
_DEPTH = 8  # buffers: what the writer may lag behind while the disk is busy


class Conveyor:
    """Owns the buffers and the writing thread for one file.

    Args:
        work: is given every chunk, in order, in the writing thread.
    Raises: on leaving, or in `take`, what `work` raised; the chunks after that are thrown away.
    """

    def __init__(self, work: Callable[[np.ndarray], None]):
        self._work = work
        self._problem: BaseException | None = None
        self._free: SimpleQueue[np.ndarray] = SimpleQueue()
        self._full: SimpleQueue[np.ndarray | None] = SimpleQueue()
        for _ in range(_DEPTH):
            self._free.put(np.empty(CHUNK_ELEMENTS, dtype=np.float32))
        self._thread = Thread(target=self._run, name="conveyor", daemon=True)

    def take(self) -> np.ndarray:
        """A free buffer of CHUNK_ELEMENTS; waits for one."""
        buffer = self._free.get()
        if self._problem is not None:
            raise self._problem
        return buffer

    def put(self, chunk: np.ndarray) -> None:
        """Hands on a chunk: the first elements of a buffer that was taken."""
        self._full.put(chunk)

    def __enter__(self) -> "Conveyor":
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
            self._free.put(chunk if chunk.base is None else chunk.base)  # the whole buffer behind a part of it

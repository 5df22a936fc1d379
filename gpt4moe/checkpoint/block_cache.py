"""Blocks of checkpoint files that were read and verified last: pieces of a tensor share blocks."""

from collections import OrderedDict
from threading import Lock

import numpy as np

_CACHE_BYTES = 192 * 2**20


class BlockCache:
    """The most recently read blocks of any file, up to a number of bytes; at least one block. For several threads."""

    def __init__(self, limit_bytes: int = _CACHE_BYTES):
        self.limit_bytes = limit_bytes
        self.blocks: OrderedDict[tuple[str, int], np.ndarray] = OrderedDict()
        self.cached_bytes = 0
        self.lock = Lock()

    def get(self, key: tuple[str, int]) -> np.ndarray | None:
        with self.lock:
            if key in self.blocks:
                self.blocks.move_to_end(key)
            return self.blocks.get(key)

    def make_room(self, size: int) -> None:
        """Before a block of so many bytes is made."""
        with self.lock:
            self._make_room(size)

    def put(self, key: tuple[str, int], block: np.ndarray) -> None:
        with self.lock:
            if key not in self.blocks:
                self._make_room(block.nbytes)  # another thread may have put one since
                self.blocks[key] = block
                self.cached_bytes += block.nbytes

    def _make_room(self, size: int) -> None:
        while self.blocks and self.cached_bytes + size > self.limit_bytes:
            self.cached_bytes -= self.blocks.popitem(last=False)[1].nbytes

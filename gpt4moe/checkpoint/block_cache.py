"""Blocks of checkpoint files that were read and verified last: pieces of a tensor share blocks."""

from collections import OrderedDict

import numpy as np

_CACHE_BYTES = 192 * 2**20


class BlockCache:
    """The most recently read blocks of any file, up to a number of bytes; at least one block."""

    def __init__(self, limit_bytes: int = _CACHE_BYTES):
        self.limit_bytes = limit_bytes
        self.blocks: OrderedDict[tuple[str, int], np.ndarray] = OrderedDict()
        self.cached_bytes = 0

    def get(self, key: tuple[str, int]) -> np.ndarray | None:
        if key in self.blocks:
            self.blocks.move_to_end(key)
        return self.blocks.get(key)

    def make_room(self, size: int) -> None:
        while self.blocks and self.cached_bytes + size > self.limit_bytes:
            self.cached_bytes -= self.blocks.popitem(last=False)[1].nbytes

    def put(self, key: tuple[str, int], block: np.ndarray) -> None:
        self.blocks[key] = block
        self.cached_bytes += block.nbytes

"""Token files and indexes in blocks: a block is checked against its sum before the first byte of it is used.

.sums    CRC-32 of every block of the .bin, then of every block of the .idx     uint32 each
"""

import hashlib
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gpt4moe.errors import DataError

BLOCK_BYTES = 1 << 15
"""Of a .bin. A sample of 4096 tokens needs one or two blocks: checking them costs less than 0.1 ms."""
INDEX_BLOCK_BYTES = 1 << 12
"""Of an .idx. A document is found by halving, which looks at some twenty places far from one another."""


class Blocks:
    """The blocks of a mapped file, and which of them were found whole.

    Args:
        content: of the file.
        sums: of its blocks.
        made_by: the command that makes such a source, for errors.
        see: called with each block that is whole, once.
    """

    def __init__(
        self, path: Path, content: NDArray[np.uint8], sums: NDArray[np.uint32], block_bytes: int, made_by: str,
        see: Callable[[NDArray[np.uint8]], None] = lambda content: None,
    ):  # fmt: skip
        self.path, self.content, self.sums, self.made_by, self.see = path, content, sums, made_by, see
        self.block_bytes = block_bytes
        self.is_whole = bytearray(-(-len(sums) // 8))
        """One bit a block."""

    def require(self, first: int, last: int) -> None:
        """Checks the blocks of bytes first to last - 1 that were not. Raises: DataError for a damaged one."""
        for block in range(first // self.block_bytes, (last - 1) // self.block_bytes + 1):
            if not self.is_whole[block >> 3] >> (block & 7) & 1:
                self._check(block)

    def _check(self, block: int) -> None:
        content = self.content[block * self.block_bytes : (block + 1) * self.block_bytes]
        if zlib.crc32(content.data) != self.sums[block]:
            raise damaged_block(self.path, block, self.block_bytes, self.made_by)
        self.see(content)
        self.is_whole[block >> 3] |= 1 << (block & 7)


def damaged_block(path: Path, block: int, block_bytes: int, made_by: str) -> DataError:
    start = block * block_bytes
    return DataError(
        f"{path} is damaged: bytes {start:,} to {start + block_bytes - 1:,} are not those that were written.",
        restore(made_by),
    )


def restore(made_by: str) -> str:
    """The cure of a damaged file of a source."""
    return f"Restore the file from its original, or make the source again ({made_by})."


def num_blocks(num_bytes: int, block_bytes: int) -> int:
    return -(-num_bytes // block_bytes)


def hash_blocks(path: Path, block_bytes: int) -> tuple[str, list[int]]:
    """sha256 of a file and the sums of its blocks; it is read once."""
    digest, sums = hashlib.sha256(), []
    with path.open("rb") as stream:
        while block := stream.read(block_bytes):
            digest.update(block)
            sums.append(zlib.crc32(block))
    return digest.hexdigest(), sums

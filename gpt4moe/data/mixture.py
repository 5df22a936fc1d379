"""Which source, epoch and position the n-th sample of a run has: a function of (seed, n) alone.

Samples come in blocks. In every block the number of samples of each source follows its share (largest remainder), and
the order is seeded. So at any step the mixture is right to within one block, and a checkpoint needs to store only n.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from gpt4moe.data.permutation import derived_keys, mix64
from gpt4moe.errors import DataError

_SMALLEST_BLOCK, _LARGEST_BLOCK = 1_000, 1_000_000
# At least this many samples of a block for the smallest share, so that rounding changes it by 5% at most.
_SMALLEST_COUNT = 10


@dataclass(frozen=True, slots=True)
class Draw:
    """Where a sample comes from: `position` in the order of pass `epoch` over `source`."""

    source: str
    epoch: int
    position: int


class Mixture:
    """Sources mixed by their shares. Its only state is a cache of a few blocks' orders.

    Args:
        sources: name -> number of samples of one epoch.
        weights: name -> share, normalised here; a source that is missing or has 0 is left out.
        seed: of the order in each block.
    Raises: DataError for a weight of an unknown source, and for a share too small for the largest block.
    """

    def __init__(self, sources: dict[str, int], weights: dict[str, float], seed: int):
        for name in weights:
            if name not in sources:
                raise DataError(f"data.sources names {name}, which is not there.", f"Choose of: {', '.join(sources)}.")
        self.names = [name for name in sorted(sources) if weights.get(name, 0) > 0]
        if not self.names:
            raise DataError("No source of the mixture has a share above 0.", "Give data.sources a positive share.")
        total = math.fsum(weights[name] for name in self.names)
        shares = [weights[name] / total for name in self.names]
        self.seed = seed
        self.block_size = _block_size(self.names, shares)
        self.counts = largest_remainder(shares, self.block_size)
        """Samples of each source in one block, in the order of `names`."""
        self._sizes = [sources[name] for name in self.names]
        self._block = lru_cache(maxsize=4)(self._make_block)

    def draw(self, n: int) -> Draw:
        """Where sample n of the run comes from, n counted from 0."""
        block, offset = divmod(n, self.block_size)
        source_index, rank = self._block(block)
        source = int(source_index[offset])
        epoch, position = divmod(block * self.counts[source] + int(rank[offset]), self._sizes[source])
        return Draw(self.names[source], epoch, position)

    def consumed(self, n: int) -> dict[str, int]:
        """Samples of each source among the first n of the run."""
        block, offset = divmod(n, self.block_size)
        partial = np.bincount(self._block(block)[0][:offset], minlength=len(self.names))
        return {
            name: block * count + int(more) for name, count, more in zip(self.names, self.counts, partial, strict=True)
        }

    def _make_block(self, block: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The source of each place in a block, and how many of that source come before it; both [block_size]."""
        (key,) = derived_keys(1, "block", self.seed, block)
        hashes = mix64(np.arange(self.block_size, dtype=np.uint64) + np.uint64(key))
        # A stable sort of our own hashes, because NumPy's shuffle may change with its version, and the data with it.
        source_index = np.repeat(np.arange(len(self.names)), self.counts)[np.argsort(hashes, kind="stable")]
        rank: NDArray[np.int64] = np.empty(self.block_size, dtype=np.int64)
        for source, count in enumerate(self.counts):
            rank[source_index == source] = np.arange(count)
        return source_index, rank


def largest_remainder(shares: list[float], total: int) -> list[int]:
    """Whole numbers that sum to total, nearest to shares * total; ties go to the earlier source."""
    ideal = [share * total for share in shares]
    counts = [math.floor(value) for value in ideal]
    by_remainder = sorted(range(len(shares)), key=lambda i: (counts[i] - ideal[i], i))
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def _block_size(names: list[str], shares: list[float]) -> int:
    size, smallest = _SMALLEST_BLOCK, min(shares)
    while smallest * size < _SMALLEST_COUNT and size < _LARGEST_BLOCK:
        size *= 10
    if smallest * size < 1:
        name = names[shares.index(smallest)]
        raise DataError(
            f"data.sources.{name} is a share of {smallest:.2g}: less than one sample in {_LARGEST_BLOCK}.",
            f"Set ++data.sources.{name}=0, or a larger share.",
        )
    return size

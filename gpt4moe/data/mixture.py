"""Which source, epoch and sample is the n-th of a run: a pure function of (seed, n).

Samples come in blocks. Every block holds each source exactly by its share (largest remainder), in a seeded order of
its own, so a run stopped anywhere has seen the mixture to within one block, and no state but n is ever saved.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from gpt4moe.data.permutation import derived_keys, mix64
from gpt4moe.errors import DataError

_SMALLEST_BLOCK, _LARGEST_BLOCK = 1_000, 1_000_000
# The smallest share gets at least this many samples of a block: rounding then changes it by 5% at most.
_SMALLEST_COUNT = 10


@dataclass(frozen=True, slots=True)
class Draw:
    """Where one sample of the mixture comes from: position `position` of pass `epoch` over `source`."""

    source: str
    epoch: int
    position: int


class Mixture:
    """Sources by their shares. Holds the order of a few blocks as a cache and nothing else.

    Args:
        sources: name -> number of samples of one epoch.
        weights: name -> share, normalised here; a source without one, or with 0, never appears.
        seed: of the order inside blocks.
    Raises: DataError for a weight without source, and for a share too small for the largest block.
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
        """Where sample n of the run (from 0) comes from."""
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
        """Source index of each place of a block, and how many of that source stand before it; both [block_size]."""
        (key,) = derived_keys(1, "block", self.seed, block)
        hashes = mix64(np.arange(self.block_size, dtype=np.uint64) + np.uint64(key))
        # A stable sort of our own hashes: NumPy may change its shuffle between versions, and then a run its data.
        source_index = np.repeat(np.arange(len(self.names)), self.counts)[np.argsort(hashes, kind="stable")]
        rank: NDArray[np.int64] = np.empty(self.block_size, dtype=np.int64)
        for source, count in enumerate(self.counts):
            rank[source_index == source] = np.arange(count)
        return source_index, rank


def largest_remainder(shares: list[float], total: int) -> list[int]:
    """Whole numbers nearest to shares * total that sum to total; ties go to the earlier source."""
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
            f"Set ++data.sources.{name}=0, or to a share that trains something.",
        )
    return size

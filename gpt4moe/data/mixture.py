"""Which source, epoch and position the n-th sample of a run has: a function of (seed, n) alone.

Samples come in blocks. At the end of every block each source has had its share of all samples so far, rounded (largest
remainder); the order in a block is seeded. So at any step the mixture is right to within one block, over a run it is
exact, and a checkpoint needs to store only n.
A phase has shares of its own from a sample on; every source goes on at the position that it has reached.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from gpt4moe.data.permutation import derived_keys, mix64
from gpt4moe.errors import DataError

_SMALLEST_BLOCK, _LARGEST_BLOCK = 1_000, 1_000_000
_SMALLEST_COUNT = 10
"""At least this many samples of a block are of the smallest share, so that no block is far from it."""
_LEAST_COUNT = 2
"""In the largest block: with fewer, a rounded sum might fall from one block to the next."""


@dataclass(frozen=True, slots=True)
class Draw:
    """Where a sample comes from: `position` in the order of pass `epoch` over `source`."""

    source: str
    epoch: int
    position: int


@dataclass(frozen=True, slots=True)
class Draws:
    """Draw of many samples, as arrays of one length."""

    source: NDArray[np.int64]
    """Index into PhasedMixture.names."""
    epoch: NDArray[np.int64]
    position: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Phase:
    """Shares from a sample of the run on."""

    first_sample: int
    shares: dict[str, float]


def names_of(phases: Sequence[Phase]) -> list[str]:
    """The sources that are read in any phase, sorted."""
    return sorted({name for phase in phases for name in phase.shares})


class PhasedMixture:
    """A mixture whose shares change. Later phases change no sample of earlier ones.

    Args:
        sources: name -> number of samples of one epoch.
        phases: the first from sample 0 on, in ascending order.
    Raises: DataError as Mixture does.
    """

    def __init__(self, sources: dict[str, int], phases: Sequence[Phase], seed: int):
        self.sizes, self.names = sources, names_of(phases)
        self.starts = [phase.first_sample for phase in phases]
        self.mixtures = [
            Mixture(sources, phase.shares, f"{seed}/{number}" if number else seed)
            for number, phase in enumerate(phases)
        ]
        self._before = [dict.fromkeys(sources, 0)]
        """Samples of each source before each phase."""
        for number, start in enumerate(self.starts[1:]):
            self._before.append(self._counted(number, start - self.starts[number]))

    def draw(self, n: int) -> Draw:
        """Where sample n of the run comes from, n counted from 0."""
        at = bisect_right(self.starts, n) - 1
        source, count = self.mixtures[at].place(n - self.starts[at])
        epoch, position = divmod(self._before[at][source] + count, self.sizes[source])
        return Draw(source, epoch, position)

    def draws(self, numbers: NDArray[np.int64]) -> Draws:
        """`draw` of many samples in one go, in any order; 0.1 microseconds each in place of 5."""
        source, count = np.empty_like(numbers), np.empty_like(numbers)
        phase = np.searchsorted(self.starts, numbers, side="right") - 1
        for at in np.unique(phase).tolist():
            inside, mixture = np.flatnonzero(phase == at), self.mixtures[at]
            own, before = mixture.places(numbers[inside] - self.starts[at])
            source[inside] = np.array([self.names.index(name) for name in mixture.names])[own]
            count[inside] = np.array([self._before[at][name] for name in mixture.names])[own] + before
        epoch, position = np.divmod(count, np.array([self.sizes[name] for name in self.names])[source])
        return Draws(source, epoch, position)

    def consumed(self, n: int) -> dict[str, int]:
        """Samples of each source among the first n of the run."""
        at = bisect_right(self.starts, n) - 1
        counted = self._counted(at, n - self.starts[at])
        return {name: counted[name] for name in self.names}

    def _counted(self, at: int, n: int) -> dict[str, int]:
        """Samples of each source at the n-th sample of a phase, with those of the phases before."""
        inside = self.mixtures[at].consumed(n)
        return {name: count + inside.get(name, 0) for name, count in self._before[at].items()}


class Mixture:
    """Sources mixed by their shares. Its only state is a cache of a few blocks' orders.

    Args:
        sources: name -> number of samples of one epoch.
        weights: name -> share, normalised here; a source that is missing or has 0 is left out.
        seed: of the order in each block; a text for the later phases of a run.
    Raises: DataError for a weight of an unknown source, and for a share too small for the largest block.
    """

    def __init__(self, sources: dict[str, int], weights: dict[str, float], seed: int | str):
        for name in weights:
            if name not in sources:
                raise DataError(f"data.sources names {name}, which is not there.", f"Choose of: {', '.join(sources)}.")
        self.names = [name for name in sorted(sources) if weights.get(name, 0) > 0]
        if not self.names:
            raise DataError("No source of the mixture has a share above 0.", "Give data.sources a positive share.")
        total = math.fsum(weights[name] for name in self.names)
        self.shares = [weights[name] / total for name in self.names]
        self.seed = seed
        self.block_size = _block_size(self.names, self.shares)
        self._block = lru_cache(maxsize=4)(self._make_block)

    def place(self, n: int) -> tuple[str, int]:
        """The source of sample n, and how many samples of it come before."""
        block, offset = divmod(n, self.block_size)
        source_index, rank = self._block(block)
        source = int(source_index[offset])
        return self.names[source], int(rank[offset])

    def places(self, numbers: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """`place` of many samples; sources as indices into `names`."""
        source, count = np.empty_like(numbers), np.empty_like(numbers)
        blocks, offsets = np.divmod(numbers, self.block_size)
        for block in np.unique(blocks).tolist():
            inside = np.flatnonzero(blocks == block)
            source_index, rank = self._block(block)
            source[inside], count[inside] = source_index[offsets[inside]], rank[offsets[inside]]
        return source, count

    def consumed(self, n: int) -> dict[str, int]:
        """Samples of each source among the first n of the run."""
        block, offset = divmod(n, self.block_size)
        partial = np.bincount(self._block(block)[0][:offset], minlength=len(self.names))
        before = self._before(block)
        return {name: count + int(more) for name, count, more in zip(self.names, before, partial, strict=True)}

    def _before(self, block: int) -> list[int]:
        """Samples of each source before a block."""
        return largest_remainder(self.shares, block * self.block_size)

    def _make_block(self, block: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The source of each place in a block, and how many of that source come before it in all; both [block_size]."""
        (key,) = derived_keys(1, "block", self.seed, block)
        hashes = mix64(np.arange(self.block_size, dtype=np.uint64) + np.uint64(key))
        # A stable sort of our own hashes, because NumPy's shuffle may change with its version, and the data with it.
        before = self._before(block)
        counts = np.subtract(self._before(block + 1), before)
        source_index = np.repeat(np.arange(len(self.names)), counts)[np.argsort(hashes, kind="stable")]
        rank: NDArray[np.int64] = np.empty(self.block_size, dtype=np.int64)
        for source, count in enumerate(counts):
            rank[source_index == source] = before[source] + np.arange(count)
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
    if smallest * size < _LEAST_COUNT:
        name = names[shares.index(smallest)]
        raise DataError(
            f"data.sources.{name} has a share of {smallest:.2g}: below {_LEAST_COUNT} samples in {_LARGEST_BLOCK:,}.",
            f"Set ++data.sources.{name}=0, or a larger share.",
        )
    return size

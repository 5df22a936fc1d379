"""Which source, epoch and position the n-th sample of a run has: a function of (seed, n) alone.

Samples come in blocks. At the end of every block each source has had its share of all samples so far, rounded (largest
remainder); the order in a block is seeded. So at any step the mixture is right to within one block, over a run it is
exact, and a checkpoint needs to store only n.
A phase has shares of its own from a sample on; every source goes on at the position that it has reached.

Where the length of samples changes, a source is permuted in windows of the longest length. A part of the run with
shorter samples reads pieces of windows; the next part begins with a window that no part before has touched:

    windows of a source, in the order of the epoch     w0 w1 w2 | w3 w4 w5 w6 ...
    part 0: samples of half a window                   5 halves of w0, w1, w2, in an order of their own; 1 is left over
    part 1: whole windows                              w3 w4 w5 w6 ...
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from gpt4moe.data.permutation import Permutation, PieceOrder, derived_keys, mix64
from gpt4moe.errors import DataError

_SMALLEST_BLOCK, _LARGEST_BLOCK = 1_000, 1_000_000
_SMALLEST_COUNT = 10
"""At least this many samples of a block are of the smallest share, so that no block is far from it."""
_LEAST_COUNT = 2
"""In the largest block: with fewer, a rounded sum might fall from one block to the next."""


@dataclass(frozen=True, slots=True)
class Draw:
    """Where a sample comes from: `position` in the order of pass `epoch` over `source`, counted in samples of its
    length."""

    source: str
    epoch: int
    position: int
    part: int = 0
    """Of the run (Part), which says the length."""


@dataclass(frozen=True, slots=True)
class Draws:
    """Draw of many samples, as arrays of one length."""

    source: NDArray[np.int64]
    """Index into PhasedMixture.names."""
    epoch: NDArray[np.int64]
    position: NDArray[np.int64]
    part: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Phase:
    """Shares from a sample of the run on."""

    first_sample: int
    shares: dict[str, float]


@dataclass(frozen=True, slots=True)
class Part:
    """Samples of one length, from a sample of the run on."""

    first_sample: int
    pieces: int
    """How many of them make a window, the longest sample of the run."""


WHOLE = (Part(0, 1),)
"""Of a run whose samples all have one length."""


def names_of(phases: Sequence[Phase]) -> list[str]:
    """The sources that are read in any phase, sorted."""
    return sorted({name for phase in phases for name in phase.shares})


class PhasedMixture:
    """A mixture whose shares, and whose samples' length, change. Later phases change no sample of earlier ones.

    Args:
        sources: name -> number of windows of one epoch: of samples, where all have one length.
        phases: the first from sample 0 on, in ascending order.
        parts: so too. The last one has samples of a whole window.
    Raises: DataError as Mixture does.
    """

    def __init__(self, sources: dict[str, int], phases: Sequence[Phase], seed: int, parts: Sequence[Part] = WHOLE):
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
        self.parts, self._part_starts = parts, [part.first_sample for part in parts]
        self._windows = [dict.fromkeys(sources, 0)]
        """Windows of each source that the parts before each part have touched, over all epochs."""
        self._shift = [dict.fromkeys(sources, 0)]
        """Of each part: samples of a source so far + this = pieces of its windows so far, in pieces of this part."""
        for part, following in pairwise(parts):
            counts, shift = self._all_consumed(following.first_sample), self._shift[-1]
            touched = {name: -(-(count + shift[name]) // part.pieces) for name, count in counts.items()}
            self._windows.append(touched)
            self._shift.append({name: touched[name] * following.pieces - counts[name] for name in sources})

    def draw(self, n: int) -> Draw:
        """Where sample n of the run comes from, n counted from 0."""
        at = bisect_right(self.starts, n) - 1
        source, count = self.mixtures[at].place(n - self.starts[at])
        part = bisect_right(self._part_starts, n) - 1
        count += self._before[at][source] + self._shift[part][source]
        epoch, position = divmod(count, self.sizes[source] * self.parts[part].pieces)
        return Draw(source, epoch, position, part)

    def draws(self, numbers: NDArray[np.int64]) -> Draws:
        """`draw` of many samples in one go, in any order; 0.1 microseconds each in place of 5."""
        source, count = np.empty_like(numbers), np.empty_like(numbers)
        phase = np.searchsorted(self.starts, numbers, side="right") - 1
        for at in np.unique(phase).tolist():
            inside, mixture = np.flatnonzero(phase == at), self.mixtures[at]
            own, before = mixture.places(numbers[inside] - self.starts[at])
            source[inside] = np.array([self.names.index(name) for name in mixture.names])[own]
            count[inside] = np.array([self._before[at][name] for name in mixture.names])[own] + before
        part = np.searchsorted(self._part_starts, numbers, side="right") - 1
        for at in range(1, len(self.parts)):
            shift = np.array([self._shift[at][name] for name in self.names])
            count += np.where(part == at, shift[source], 0)
        pieces = np.array([one.pieces for one in self.parts])[part]
        epoch, position = np.divmod(count, np.array([self.sizes[name] for name in self.names])[source] * pieces)
        return Draws(source, epoch, position, part)

    def order(self, source: str, epoch: int, part: int, seed: int) -> Permutation | PieceOrder:
        """Draw.position -> which sample of its length of the source's stream it is. Of the pass `epoch` and a part.

        Args:
            seed: of the order.
        """
        size, pieces = self.sizes[source], self.parts[part].pieces
        windows = Permutation(size, seed, epoch, source)
        if pieces == 1:
            return windows
        first = max(0, self._windows[part][source] - epoch * size)
        end = min(size, self._windows[part + 1][source] - epoch * size)
        return PieceOrder(
            windows, first, pieces, Permutation((end - first) * pieces, seed, epoch, f"{source}/pieces of part {part}")
        )

    def consumed(self, n: int) -> dict[str, int]:
        """Samples of each source among the first n of the run."""
        counted = self._all_consumed(n)
        return {name: counted[name] for name in self.names}

    def epochs(self, n: int) -> dict[str, float]:
        """How often the first n samples read each source. What a change of length leaves over counts as read."""
        part = bisect_right(self._part_starts, n) - 1
        return {
            name: (count + self._shift[part][name]) / (self.parts[part].pieces * self.sizes[name])
            for name, count in self.consumed(n).items()
        }

    def _all_consumed(self, n: int) -> dict[str, int]:
        """`consumed`, with the sources that are never read."""
        at = bisect_right(self.starts, n) - 1
        return self._counted(at, n - self.starts[at])

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

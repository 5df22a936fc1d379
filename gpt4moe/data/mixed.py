"""The samples of a mixture of token streams: the n-th one, or those of a whole step written into arrays. No torch.

    numbers --places, for some steps ahead--> source, stretch --read_into--> rows of a StepText

One sample at a time is for people and tests. A step's samples cost a tenth of that each: places are worked out for many
steps in one go, and a stretch of a file goes straight into its row of tokens and its row of labels.
"""

from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from gpt4moe.data.mixture import Draw, Draws, PhasedMixture
from gpt4moe.data.permutation import Permutation, PieceOrder
from gpt4moe.data.samples import TokenSample, in_documents, packed_sample
from gpt4moe.data.shards import ShardedTokens

_MOST_AHEAD = 4096
"""Samples whose places are worked out in one go: about a millisecond, and 100 KB."""


@dataclass(frozen=True, slots=True)
class StepText:
    """n samples of S tokens, as arrays."""

    tokens: NDArray[np.int64]
    """[n, S]"""
    labels: NDArray[np.int64]
    """[n, S]: the token after each one."""
    loss_mask: NDArray[np.float32]
    """[n, S]"""
    source_index: NDArray[np.int64]
    """[n]: indices into Data.source_names."""
    documents: NDArray[np.int64] | None
    """[n, S], as TokenSample.documents; None: samples have none."""
    position_ids: NDArray[np.int64] | None
    """[n, S], the place of each token in its document, where there are documents."""
    largest: int
    """No token is larger. With a negative token: more than any vocabulary."""


@dataclass(frozen=True, slots=True)
class MixedSamples:
    """The n-th sample of a mixture of token streams."""

    streams: dict[str, ShardedTokens]
    names: list[str]
    """Data.source_names."""
    mixture: PhasedMixture
    seq_length: int
    """Of a window: the longest sample."""
    seed: int
    reshuffle: bool
    """Whether every epoch has an order of its own. False: all epochs have the order of the first."""
    by_document: bool = False
    """Whether samples have documents."""
    ahead: "_Ahead" = field(init=False, default_factory=lambda: _Ahead(), repr=False, compare=False)

    def sample(self, n: int, *, pixels: bool = True) -> TokenSample:
        draw, index = self.place(n)
        stream, length = self.streams[draw.source], self.length_of(draw)
        start = index * length
        sample = packed_sample(stream, index, length)
        if self.by_document:
            sample = in_documents(sample, stream.begins(slice(start, start + length + 1)))
        return replace(sample, source_index=self.names.index(draw.source))

    def step_text(self, numbers: NDArray[np.int64], stride: int) -> StepText:
        """Samples `numbers`, as `sample` has each.

        Args:
            numbers: ascending, all of one length.
            stride: the next step's are probably numbers + stride.
        Raises: ValueError for samples of several lengths; DataError for a damaged block.
        """
        draws, index = self.ahead.places(self, numbers, stride)
        first, last = int(draws.part[0]), int(draws.part[-1])
        if first != last:
            raise ValueError(f"samples {numbers[0]} to {numbers[-1]} are of several lengths")
        length = self.seq_length // self.mixture.parts[first].pieces
        tokens: NDArray[np.int64] = np.empty((len(numbers), length), dtype=np.int64)
        labels, largest = np.empty_like(tokens), 0
        streams = [self.streams[name] for name in self.mixture.names]
        starts = (index * length).tolist()
        for source, start, inputs, following in zip(draws.source.tolist(), starts, tokens, labels, strict=True):
            largest = max(largest, streams[source].read_into(start, inputs, following))
        loss_mask: NDArray[np.float32] = np.ones(tokens.shape, dtype=np.float32)
        documents, position_ids = None, None
        if self.by_document:
            begins = [
                streams[source].document_starts(slice(start, start + length + 1))
                for source, start in zip(draws.source.tolist(), starts, strict=True)
            ]
            documents, position_ids = _in_documents(begins, loss_mask)
        source_index = np.array([self.names.index(name) for name in self.mixture.names])[draws.source]
        return StepText(tokens, labels, loss_mask, source_index, documents, position_ids, largest)

    def origin(self, n: int, at: int) -> str:
        draw, index = self.place(n)
        return f"source {draw.source}, {self.streams[draw.source].origin(index * self.length_of(draw) + at)}"

    def length_of(self, draw: Draw) -> int:
        """S of a sample: its tokens."""
        return self.seq_length // self.mixture.parts[draw.part].pieces

    def place(self, n: int) -> tuple[Draw, int]:
        """Where sample n is drawn from, and which stretch of S tokens (length_of) of its source's stream it is."""
        draw = self.mixture.draw(n)
        return draw, self._order(draw.source, draw.epoch, draw.part)(draw.position)

    def places(self, numbers: NDArray[np.int64]) -> tuple[Draws, NDArray[np.int64]]:
        """`place` of many samples in one go."""
        draws, index = self.mixture.draws(numbers), np.empty_like(numbers)
        passes = (draws.epoch * len(self.mixture.parts) + draws.part) * len(self.mixture.names) + draws.source
        by_pass = np.argsort(passes, kind="stable")
        for inside in np.split(by_pass, np.flatnonzero(np.diff(passes[by_pass])) + 1) if numbers.size else []:
            rest, source = divmod(int(passes[inside[0]]), len(self.mixture.names))
            order = self._order(self.mixture.names[source], *divmod(rest, len(self.mixture.parts)))
            index[inside] = order.indices(draws.position[inside])
        return draws, index

    def _order(self, source: str, epoch: int, part: int) -> Permutation | PieceOrder:
        """Of a pass over a source."""
        return self.mixture.order(source, epoch if self.reshuffle else 0, part, self.seed)

    def consumed(self, n: int) -> dict[str, int]:
        return self.mixture.consumed(n)


def _in_documents(
    begins: list[NDArray[np.int64]], loss_mask: NDArray[np.float32]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Documents and position ids of rows, each [n, S]. The label of a document's last token counts no longer.

    Args:
        begins: of each row, where in its S + 1 tokens a document begins; ascending.
        loss_mask: [n, S], changed in place.
    """
    length = loss_mask.shape[1]
    # A row's first token begins a document of the row, wherever its document begins.
    inner = [found[found > 0] for found in begins]
    rows = np.repeat(np.arange(len(inner)), [len(found) for found in inner])
    places = np.concatenate(inner)
    loss_mask[rows, places - 1] = 0
    is_input = places < length
    starts = np.sort(np.append(np.arange(len(inner)) * length, (rows * length + places)[is_input]))
    lengths = np.diff(starts, append=loss_mask.size)
    numbers = np.arange(len(starts))
    numbers -= numbers[starts % length == 0][starts // length]
    position_ids = np.arange(loss_mask.size) - np.repeat(starts, lengths)
    return np.repeat(numbers, lengths).reshape(-1, length), position_ids.reshape(-1, length)


@dataclass(frozen=True, slots=True)
class _Steps:
    """The places of some steps of a rank, whose samples are `first`, first + stride, first + 2 stride, ..."""

    first: NDArray[np.int64]
    stride: int
    count: int
    draws: Draws
    index: NDArray[np.int64]

    def step(self, numbers: NDArray[np.int64], stride: int) -> int | None:
        """Which of all such steps `numbers` are; None: none of them."""
        step = int(numbers[0] - self.first[0]) // self.stride
        is_one = stride == self.stride and np.array_equal(numbers, self.first + step * stride)
        return step if is_one else None


class _Ahead:
    """Keeps the places of the next steps. What it returns depends on its arguments alone.

    A place alone costs Python's arithmetic on 64-bit numbers; in thousands, numpy's: a tenth or less.
    """

    def __init__(self) -> None:
        self._steps: _Steps | None = None

    def places(self, samples: MixedSamples, numbers: NDArray[np.int64], stride: int) -> tuple[Draws, NDArray[np.int64]]:
        """MixedSamples.places of `numbers`. Twice as many steps each time that one follows the last: a single step, as
        the first one of a launch, works out no other."""
        steps, size = self._steps, len(numbers)
        step = steps.step(numbers, stride) if steps is not None else None
        if steps is None or step is None or not 0 <= step < steps.count:
            count = min(2 * steps.count, max(1, _MOST_AHEAD // size)) if steps is not None and step is not None else 1
            draws, index = samples.places((numbers + stride * np.arange(count)[:, None]).reshape(-1))
            steps, step = _Steps(numbers, stride, count, draws, index), 0
            self._steps = steps
        own = slice(step * size, (step + 1) * size)
        draws = steps.draws
        return Draws(draws.source[own], draws.epoch[own], draws.position[own], draws.part[own]), steps.index[own]

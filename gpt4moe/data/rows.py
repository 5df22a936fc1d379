"""Documents as rows: whole ones, packed into rows of S + 1 tokens in a seeded order.

    documents of a split --seeded order--> best fit among the open rows --> rows --order of the epoch--> n-th sample

    row      a0 a1 a2 a3 | b0 b1 b2 | padding        S + 1 tokens; no document is in two rows
    labels      a1 a2 a3   b0 b1 b2                  b0 is never learned: nothing before it belongs to it

Which documents share a row depends on the seed alone; every epoch has another order of the rows. So sample n stays a
function of (seed, n). The table costs 20 bytes a document.
"""

from array import array
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from gpt4moe.config.data import LongRows
from gpt4moe.data.mixture import Draw, PhasedMixture
from gpt4moe.data.permutation import Permutation
from gpt4moe.data.samples import TokenSample, in_documents, num_samples, packed_sample
from gpt4moe.data.shards import ShardedTokens
from gpt4moe.errors import DataError

OPEN_ROWS = 256
"""A document goes into the fullest of so many rows that has room for it."""
_ROW_BITS = 40
_ROW = (1 << _ROW_BITS) - 1


class Rows(Protocol):
    """One split of a source as samples, in an order of their own."""

    @property
    def num_rows(self) -> int: ...

    def row(self, index: int, *, pixels: bool = True) -> TokenSample: ...

    def token(self, index: int, at: int = 0) -> tuple[ShardedTokens, int]:
        """The stream of a row, and the place in it of the row's token number `at`. Of padding: of the last token."""

    def summary(self) -> str:
        """For a person."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RowLayout:
    """How documents become rows."""

    seq_length: int
    seed: int
    """Of the order in which they are packed."""
    is_packed: bool
    """Several to a row, none of which sees another."""
    long_rows: LongRows
    padding_id: int


@dataclass(frozen=True, slots=True)
class Pieces:
    """Stretches of a stream, each learned by itself: documents, or parts of them."""

    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]

    def of(self, order: NDArray[np.int64]) -> "Pieces":
        return Pieces(self.starts[order], self.lengths[order])


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedRows:
    """Pieces of one split of a source, laid out in rows."""

    tokens: ShardedTokens
    pieces: Pieces
    """In the order of the rows."""
    bounds: NDArray[np.int64]
    """[rows + 1]: the first piece of each row."""
    layout: RowLayout
    num_long: int
    """Documents that were longer than the context, and cut or split."""
    num_left_out: int
    """Their parts without a trained token."""

    @property
    def num_rows(self) -> int:
        return len(self.bounds) - 1

    def token(self, index: int, at: int = 0) -> tuple[ShardedTokens, int]:
        begin, stretch = [found for found in self.stretches(index) if found[0] <= at][-1]
        return self.tokens, min(stretch.start + at - begin, stretch.stop - 1)

    def stretches(self, index: int) -> Iterator[tuple[int, slice]]:
        """Of each piece of a row: its place in the row, and its stretch of the stream."""
        at = 0
        for piece in range(self.bounds[index], self.bounds[index + 1]):
            start, length = int(self.pieces.starts[piece]), int(self.pieces.lengths[piece])
            yield at, slice(start, start + length)
            at += length

    def laid_out(self, index: int) -> TokenSample:
        """The tokens of a row. Every label counts but those of first tokens and of padding."""
        length = self.layout.seq_length
        tokens: NDArray[np.int64] = np.full(length + 1, self.layout.padding_id, dtype=np.int64)
        mask: NDArray[np.float32] = np.zeros(length + 1, dtype=np.float32)
        documents: NDArray[np.int32] = np.zeros(length, dtype=np.int32)
        end = 0
        for number, (at, stretch) in enumerate(self.stretches(index)):
            end = at + stretch.stop - stretch.start
            tokens[at:end] = self.tokens[stretch]
            mask[at + 1 : end] = 1
            documents[at:] = number
        if end <= length:
            documents[end:] += 1
        return TokenSample(
            tokens, mask[1:].copy(), documents=documents if self.layout.is_packed else None, num_tokens=min(end, length)
        )

    def fullness(self, what: str) -> str:
        """For a person: rows, how full they are, what was too long."""
        full = self.pieces.lengths.sum() / (self.num_rows * (self.layout.seq_length + 1))
        long = f", {self.num_long:,} longer than the context" if self.num_long else ""
        left_out = f", {self.num_left_out:,} parts without a learned token left out" if self.num_left_out else ""
        return f"{len(self.pieces.starts):,} {what} in {self.num_rows:,} rows, {full:.0%} full{long}{left_out}"


@dataclass(frozen=True, slots=True)
class TextRows:
    """A source of plain text beside others that have rows: its stretches of S + 1 tokens, as in pre-training."""

    tokens: ShardedTokens
    seq_length: int
    by_document: bool

    @property
    def num_rows(self) -> int:
        return num_samples(len(self.tokens), self.seq_length)

    def row(self, index: int, *, pixels: bool = True) -> TokenSample:
        sample = packed_sample(self.tokens, index, self.seq_length)
        if not self.by_document:
            return sample
        start = index * self.seq_length
        return in_documents(sample, self.tokens.begins(slice(start, start + self.seq_length + 1)))

    def token(self, index: int, at: int = 0) -> tuple[ShardedTokens, int]:
        return self.tokens, index * self.seq_length + at

    def summary(self) -> str:
        return f"plain text, {self.num_rows:,} rows"


@dataclass(frozen=True, slots=True)
class RowSamples:
    """The n-th sample of a mixture of sources that have rows."""

    sources: dict[str, Rows]
    names: list[str]
    """Data.source_names."""
    mixture: PhasedMixture
    seed: int
    reshuffle: bool

    def sample(self, n: int, *, pixels: bool = True) -> TokenSample:
        draw, row = self.place(n)
        sample = self.sources[draw.source].row(row, pixels=pixels)
        return replace(sample, source_index=self.names.index(draw.source))

    def origin(self, n: int, at: int) -> str:
        draw, row = self.place(n)
        stream, position = self.sources[draw.source].token(row, at)
        return f"source {draw.source}, {stream.origin(position)}"

    def place(self, n: int) -> tuple[Draw, int]:
        """Where sample n is drawn from, and which row it is."""
        draw = self.mixture.draw(n)
        epoch = draw.epoch if self.reshuffle else 0
        return draw, Permutation(self.sources[draw.source].num_rows, self.seed, epoch, draw.source)(draw.position)

    def consumed(self, n: int) -> dict[str, int]:
        return self.mixture.consumed(n)


def require_pieces(pieces: Pieces, whole: Pieces, layout: RowLayout, name: str, what: str) -> None:
    """Raises: DataError when nothing of `whole` is left to learn. name: of the source; what: its split and pieces."""
    if len(pieces.starts):
        return
    if not len(whole.starts):
        raise DataError(f"Source {name} has no {what}.", "Give it some, or name other sources (++data.sources.NAME=1).")
    raise DataError(
        f"Source {name}: data.long_rows={layout.long_rows.value} leaves nothing of {len(whole.starts):,} {what}s to "
        f"learn: what is kept in the context, model.seq_length={layout.seq_length} + 1, has no learned token (the "
        f"longest has {int(whole.lengths.max()):,} tokens).",
        "Set data.long_rows=split, or a larger model.seq_length.",
    )


def documents_of(tokens: ShardedTokens) -> Pieces:
    """Every document of a split, in the order of the stream."""
    starts, lengths = [], []
    for at, (shard, end) in enumerate(zip(tokens.shards, tokens.ends, strict=True)):
        index = tokens.index(at)
        found = index.starts(0, index.num_tokens)
        starts.append(found + end - shard.tokens)
        lengths.append(np.diff(np.append(found, index.num_tokens)))
    return Pieces(np.concatenate(starts), np.concatenate(lengths))


def shuffled(pieces: Pieces, seed: int, source: str) -> NDArray[np.int64]:
    """The order in which pieces are packed."""
    return Permutation(len(pieces.starts), seed, 0, f"{source}/rows").indices(np.arange(len(pieces.starts)))


def pack(
    lengths: NDArray[np.int64], capacity: int, images: NDArray[np.int64] | None = None, most_images: int = 0
) -> NDArray[np.int64]:
    """The row of each piece: the fullest open one with room for it, else a new one. No length is above capacity.

    Args:
        images: of each piece; no row has more than most_images.
    """
    more_images = images.tolist() if images is not None else repeat(0)
    rows: list[int] = []
    room: list[int] = []  # of the open rows, ascending: tokens left, then the row's number in the lower bits
    free = array("q")  # of the same rows: images left
    num_rows = 0
    for length, more in zip(lengths.tolist(), more_images, strict=False):
        at = bisect_left(room, length << _ROW_BITS)
        if at < len(room) and free[at] < more:
            fits = np.flatnonzero(np.array(free[at:]) >= more)
            at = at + int(fits[0]) if len(fits) else len(room)
        if at < len(room):
            key, left = room.pop(at), free.pop(at)
        else:
            key, left = (capacity << _ROW_BITS) + num_rows, most_images
            num_rows += 1
        rows.append(key & _ROW)
        key -= length << _ROW_BITS
        at = bisect_left(room, key)
        room.insert(at, key)
        free.insert(at, left - more)
        if len(room) > OPEN_ROWS:
            del room[0], free[0]
    return np.array(rows, dtype=np.int64)


def bounds_of(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """PackedRows.bounds of pieces that stand in the order of their rows."""
    return np.append(0, np.cumsum(np.bincount(rows)))

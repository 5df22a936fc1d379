"""Conversations as samples: whole ones, packed into rows of S tokens, with the mask of what is learned.

    conversations of a split --seeded order--> best fit among the open rows --> rows --order of the epoch--> n-th sample

    row      a0 a1 a2 a3 | b0 b1 b2 | padding        S + 1 tokens; no conversation is in two rows
    labels      a1 a2 a3   b0 b1 b2                  b0 is never learned: nothing before it belongs to it

Which conversations share a row depends on the seed alone; every epoch has another order of the rows. So sample n stays
a function of (seed, n). The table costs 20 bytes a conversation.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from gpt4moe.config.data import LongRows
from gpt4moe.data.catalogue import Source
from gpt4moe.data.mixture import Draw, PhasedMixture
from gpt4moe.data.origins import line_of
from gpt4moe.data.permutation import Permutation
from gpt4moe.data.samples import TokenSample
from gpt4moe.data.shards import ShardedTokens, bin_path
from gpt4moe.errors import DataError

OPEN_ROWS = 256
"""A conversation goes into the fullest of so many rows that has room for it."""


@dataclass(frozen=True, slots=True)
class Pieces:
    """Stretches of a stream, each learned by itself: conversations, or parts of them."""

    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]

    def of(self, order: NDArray[np.int64]) -> "Pieces":
        return Pieces(self.starts[order], self.lengths[order])


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversations:
    """One split of a source, laid out in rows."""

    tokens: ShardedTokens
    mask: ShardedTokens
    pieces: Pieces
    """In the order of the rows."""
    bounds: NDArray[np.int64]
    """[rows + 1]: the first piece of each row."""
    seq_length: int
    is_packed: bool
    padding_id: int
    num_long: int
    """Conversations that were longer than the context, and cut or split."""
    num_left_out: int
    """Their parts without a trained token."""

    @property
    def num_rows(self) -> int:
        return len(self.bounds) - 1

    def summary(self) -> str:
        """For a person: rows, how full they are, what was too long."""
        full = self.pieces.lengths.sum() / (self.num_rows * (self.seq_length + 1))
        long = f", {self.num_long:,} longer than the context" if self.num_long else ""
        left_out = f", {self.num_left_out:,} parts without a learned token left out" if self.num_left_out else ""
        return f"{len(self.pieces.starts):,} conversations in {self.num_rows:,} rows, {full:.0%} full{long}{left_out}"

    def row(self, index: int) -> TokenSample:
        length = self.seq_length
        tokens: NDArray[np.int64] = np.full(length + 1, self.padding_id, dtype=np.int64)
        mask: NDArray[np.float32] = np.zeros(length + 1, dtype=np.float32)
        documents: NDArray[np.int32] = np.zeros(length, dtype=np.int32)
        at = 0
        for number, piece in enumerate(range(self.bounds[index], self.bounds[index + 1])):
            start = int(self.pieces.starts[piece])
            end = at + int(self.pieces.lengths[piece])
            stretch = slice(start, start + end - at)
            tokens[at:end], mask[at:end] = self.tokens[stretch], self.mask[stretch]
            mask[at] = 0
            documents[at:] = number
            at = end
        if at <= length:
            documents[at:] += 1
        return TokenSample(
            tokens, mask[1:].copy(), documents=documents if self.is_packed else None, num_tokens=min(at, length)
        )


@dataclass(frozen=True, slots=True)
class ConversationSamples:
    """The n-th sample of a mixture of conversations."""

    sources: dict[str, Conversations]
    names: list[str]
    """Data.source_names."""
    mixture: PhasedMixture
    seed: int
    reshuffle: bool

    def sample(self, n: int) -> TokenSample:
        draw, row = self.place(n)
        return replace(self.sources[draw.source].row(row), source_index=self.names.index(draw.source))

    def place(self, n: int) -> tuple[Draw, int]:
        """Where sample n is drawn from, and which row it is."""
        draw = self.mixture.draw(n)
        epoch = draw.epoch if self.reshuffle else 0
        return draw, Permutation(self.sources[draw.source].num_rows, self.seed, epoch, draw.source)(draw.position)

    def consumed(self, n: int) -> dict[str, int]:
        return self.mixture.consumed(n)


def lay_out(
    source: Source, split: str, *, seq_length: int, seed: int, is_packed: bool, long_rows: LongRows, padding_id: int
) -> Conversations:  # fmt: skip
    """Raises: DataError for a missing file, a mask of other tokens, a conversation that is too long and must not be,
    and when none is left."""
    tokens, mask = source.tokens(split), source.mask(split)
    if [shard.tokens for shard in tokens.shards] != [shard.tokens for shard in mask.shards]:
        raise DataError(
            f"{source.folder}: the masks of {split} are not of its tokens.",
            "Make the source again (tools/prepare_chat.py).",
        )
    whole = _documents(tokens)
    most = seq_length + 1
    is_long = whole.lengths > most
    num_long = int(is_long.sum())
    if num_long and long_rows is LongRows.refuse:
        raise _too_long(source, split, tokens, whole, seq_length)
    pieces = whole.of(np.flatnonzero(~is_long))
    num_left_out = 0
    if num_long:
        parts = _parts(whole.of(np.flatnonzero(is_long)), seq_length, long_rows)
        learned = np.array(
            [mask[start + 1 : start + length].any() for start, length in zip(parts.starts, parts.lengths, strict=True)]
        )
        num_left_out = int((~learned).sum())
        kept = parts.of(np.flatnonzero(learned))
        pieces = Pieces(np.append(pieces.starts, kept.starts), np.append(pieces.lengths, kept.lengths))
        pieces = pieces.of(np.argsort(pieces.starts, kind="stable"))
    if not len(pieces.starts):
        raise DataError(f"Source {source.name} has no {split} conversation to learn from.", "Give more conversations.")
    order = Permutation(len(pieces.starts), seed, 0, f"{source.name}/rows")
    pieces = pieces.of(order.indices(np.arange(len(pieces.starts))))
    rows = pack(pieces.lengths, most) if is_packed else np.arange(len(pieces.starts))
    return Conversations(
        tokens=tokens, mask=mask, pieces=pieces.of(np.argsort(rows, kind="stable")),
        bounds=np.append(0, np.cumsum(np.bincount(rows))), seq_length=seq_length, is_packed=is_packed,
        padding_id=padding_id, num_long=num_long, num_left_out=num_left_out,
    )  # fmt: skip


def pack(lengths: NDArray[np.int64], capacity: int) -> NDArray[np.int64]:
    """The row of each piece: the fullest open one with room for it, else a new one. No length is above capacity."""
    rows: NDArray[np.int64] = np.empty(len(lengths), dtype=np.int64)
    room: list[tuple[int, int]] = []  # of the open rows, ascending: (tokens left, row)
    num_rows = 0
    for number, length in enumerate(lengths.tolist()):
        at = bisect_left(room, (length, 0))
        if at < len(room):
            left, row = room.pop(at)
        else:
            left, row, num_rows = capacity, num_rows, num_rows + 1
        rows[number] = row
        insort(room, (left - length, row))
        if len(room) > OPEN_ROWS:
            del room[0]
    return rows


def _documents(tokens: ShardedTokens) -> Pieces:
    starts, lengths = [], []
    for at, (shard, end) in enumerate(zip(tokens.shards, tokens.ends, strict=True)):
        index = tokens.index(at)
        found = index.starts(0, index.num_tokens)
        starts.append(found + end - shard.tokens)
        lengths.append(np.diff(np.append(found, index.num_tokens)))
    return Pieces(np.concatenate(starts), np.concatenate(lengths))


def _parts(long: Pieces, seq_length: int, long_rows: LongRows) -> Pieces:
    """Each of seq_length + 1 tokens at most. Those of a split conversation share a token, as samples of a stream do."""
    starts, lengths = [], []
    for start, length in zip(long.starts.tolist(), long.lengths.tolist(), strict=True):
        last = 1 if long_rows is LongRows.cut else length - 1
        for offset in range(0, last, seq_length):
            starts.append(start + offset)
            lengths.append(min(seq_length + 1, length - offset))
    return Pieces(np.array(starts), np.array(lengths))


def _too_long(source: Source, split: str, tokens: ShardedTokens, whole: Pieces, seq_length: int) -> DataError:
    worst = int(np.argmax(whole.lengths))
    where = line_of(source.folder, split, worst) or _place(source, tokens, whole, worst)
    count, longest = int((whole.lengths > seq_length + 1).sum()), int(whole.lengths[worst])
    return DataError(
        f"Source {source.name}: {count:,} of {len(whole.lengths):,} {split} conversations have more tokens than the "
        f"context, model.seq_length={seq_length} + 1. The longest has {longest:,}: {where}.",
        f"Set data.long_rows=cut or split, or model.seq_length={longest - 1} where the model can.",
    )


def _place(source: Source, tokens: ShardedTokens, whole: Pieces, number: int) -> str:
    """Where a conversation lies, of a source that has not noted its lines."""
    shard, _ = tokens.place(int(whole.starts[number]))
    first = int(np.searchsorted(whole.starts, tokens.ends[tokens.shards.index(shard)] - shard.tokens))
    return f"number {number - first} of {bin_path(source.folder, shard)}"

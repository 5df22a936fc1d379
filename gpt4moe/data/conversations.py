"""Conversations as samples: whole ones, packed into rows of S tokens (rows.py), with the mask of what is learned."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from gpt4moe.config.data import LongRows
from gpt4moe.data.catalogue import Source
from gpt4moe.data.origins import line_of
from gpt4moe.data.rows import PackedRows, Pieces, RowLayout, bounds_of, documents_of, pack, require_pieces, shuffled
from gpt4moe.data.samples import TokenSample
from gpt4moe.data.shards import ShardedTokens, bin_path
from gpt4moe.errors import DataError

_STRETCH = 1 << 20
"""Tokens of a mask that are looked at at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversations(PackedRows):
    """One split of a source, laid out in rows."""

    mask: ShardedTokens

    def summary(self) -> str:
        return self.fullness("conversations")

    def row(self, index: int, *, pixels: bool = True) -> TokenSample:
        sample = self.laid_out(index)
        learned: NDArray[np.float32] = np.zeros(self.layout.seq_length + 1, dtype=np.float32)
        for at, stretch in self.stretches(index):
            learned[at : at + stretch.stop - stretch.start] = self.mask[stretch]
        return replace(sample, loss_mask=sample.loss_mask * learned[1:])


def lay_out(source: Source, split: str, layout: RowLayout) -> Conversations:
    """Raises: DataError for a missing file, a mask of other tokens, a conversation that is too long and must not be,
    and when none is left."""
    tokens, mask = source.tokens(split), source.mask(split)
    if [shard.tokens for shard in tokens.shards] != [shard.tokens for shard in mask.shards]:
        raise DataError(
            f"{source.folder}: the masks of {split} are not of its tokens.",
            "Make the source again (tools/prepare_chat.py).",
        )
    whole = documents_of(tokens)
    most = layout.seq_length + 1
    is_long = whole.lengths > most
    num_long = int(is_long.sum())
    if num_long and layout.long_rows is LongRows.refuse:
        raise _too_long(source, split, tokens, whole, layout.seq_length)
    pieces = whole.of(np.flatnonzero(~is_long))
    num_left_out = 0
    if num_long:
        parts = _parts(whole.of(np.flatnonzero(is_long)), layout.seq_length, layout.long_rows)
        learned = _learned(mask, parts)
        num_left_out = int((~learned).sum())
        kept = parts.of(np.flatnonzero(learned))
        pieces = Pieces(np.append(pieces.starts, kept.starts), np.append(pieces.lengths, kept.lengths))
        pieces = pieces.of(np.argsort(pieces.starts, kind="stable"))
    require_pieces(pieces, whole, layout, source.name, f"{split} conversation")
    pieces = pieces.of(shuffled(pieces, layout.seed, source.name))
    rows = pack(pieces.lengths, most) if layout.is_packed else np.arange(len(pieces.starts))
    return Conversations(
        tokens=tokens, mask=mask, pieces=pieces.of(np.argsort(rows, kind="stable")),
        bounds=bounds_of(rows), layout=layout, num_long=num_long, num_left_out=num_left_out,
    )  # fmt: skip


def _parts(long: Pieces, seq_length: int, long_rows: LongRows) -> Pieces:
    """Each of seq_length + 1 tokens at most. Those of a split conversation share a token, as samples of a stream do."""
    parts = np.ones_like(long.lengths) if long_rows is LongRows.cut else -(-(long.lengths - 1) // seq_length)
    number = np.arange(parts.sum()) - np.repeat(np.cumsum(parts) - parts, parts)
    starts, lengths = np.repeat(long.starts, parts), np.repeat(long.lengths, parts)
    offset = number * seq_length
    return Pieces(starts + offset, np.minimum(lengths - offset, seq_length + 1))


def _learned(mask: ShardedTokens, parts: Pieces) -> NDArray[np.bool_]:
    """Whether each part has a learned token after its first. Parts ascend; the mask is read in long stretches."""
    firsts, ends = parts.starts + 1, parts.starts + parts.lengths
    counts: NDArray[np.int64] = np.zeros(len(firsts), dtype=np.int64)
    for begin in range(0, len(mask), _STRETCH):
        touched = slice(np.searchsorted(ends, begin, side="right"), np.searchsorted(firsts, begin + _STRETCH))
        if touched.start >= touched.stop:
            continue
        start, stop = max(begin, firsts[touched.start]), min(begin + _STRETCH, ends[touched.stop - 1])
        sums = np.append(0, np.cumsum(mask[start:stop], dtype=np.int64))
        within = [np.clip(one[touched] - start, 0, stop - start) for one in (firsts, ends)]
        counts[touched] += sums[within[1]] - sums[within[0]]
    return counts > 0


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

"""PackedDocuments: which keys the queries of a rank see where attention stays inside documents.

    a row      [ document 0 | document 1    | document 2 ]
    a chunk                [start ... stop)                  of queries; without context parallelism the whole row
    its keys               [first_key . stop)                from the first token of the document that it begins in

It is made once for each micro-batch, on the host, and every layer attends by it. It comes as Megatron's argument
packed_seq_params, which a chunk's layers hand on unread. No mask is made: documents are attended to one by one, or all
in one call of flash attention. So another document has no influence at all, and costs nothing.

Rotary embeddings are relative: in a document that begins at place p of its row all angles are p steps further, and the
products of queries and keys are the same. So the embedding is that of the whole row.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from gpt4moe.parallel.placement import sequence_chunks


@dataclass(frozen=True, slots=True)
class RowParts:
    """The documents of one row that have queries in a chunk."""

    first_key: int
    """Its place in the row."""
    queries: list[int]
    """How many queries each document has in the chunk."""
    keys: list[int]
    """How many keys each has, up to the chunk's end. More than queries only in the first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QueryChunk:
    """Queries that follow each other, [Q, B, N, D], and their keys. Offsets are cu_seqlens of flash attention."""

    stop: int
    """The place behind the last query in its row."""
    rows: list[RowParts]
    query_offsets: Tensor
    """[documents + 1] int32 on the device, in the order of the rows."""
    key_offsets: Tensor
    most_queries: int
    """Of one document."""
    most_keys: int

    @property
    def is_plain(self) -> bool:
        """Whether every query sees all keys up to its own."""
        return all(len(row.queries) == 1 and row.first_key == 0 for row in self.rows)


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedDocuments:
    """The documents of one micro-batch as one rank sees them. The last four fields are what Megatron reads."""

    chunks: list[QueryChunk]
    """One, or under context parallelism two, in the rank's order."""
    max_seqlen_q: int
    """S: for how many places the rotary embedding is made."""
    max_seqlen_kv: int
    qkv_format: str = "rows"
    """Not "thd": then Megatron would turn every document's queries by itself."""
    cp_group: None = None

    @classmethod
    def of(cls, documents: Tensor, device: torch.device, *, cp: int = 1, cp_index: int = 0) -> "PackedDocuments":
        """Args:
        documents: Batch.documents of whole sequences on the CPU, [B, S].
        device: where the rank computes.
        """
        length, rows = documents.shape[1], document_lengths(documents)
        size = length if cp == 1 else length // (2 * cp)
        chunks = [
            _chunk([_parts(row, place * size, (place + 1) * size) for row in rows], (place + 1) * size, device)
            for place in sequence_chunks(cp, cp_index)
        ]
        return cls(chunks=chunks, max_seqlen_q=length, max_seqlen_kv=length)


def document_lengths(documents: Tensor) -> list[list[int]]:
    """Of each row of [B, S] the lengths of its documents."""
    return [torch.unique_consecutive(row, return_counts=True)[1].tolist() for row in documents]


def _parts(lengths: Sequence[int], start: int, stop: int) -> RowParts:
    queries: list[int] = []
    first_key, end = 0, 0
    for length in lengths:
        begin, end = end, end + length
        if end > start and begin < stop:
            if not queries:
                first_key = begin
            queries.append(min(end, stop) - max(begin, start))
    return RowParts(first_key, queries, [queries[0] + max(start - first_key, 0), *queries[1:]])


def _chunk(rows: list[RowParts], stop: int, device: torch.device) -> QueryChunk:
    queries = [number for row in rows for number in row.queries]
    keys = [number for row in rows for number in row.keys]

    def offsets(numbers: list[int]) -> Tensor:
        made = torch.tensor([0, *accumulate(numbers)], dtype=torch.int32)
        # Pinned, or the copy would wait for all that the GPU has yet to do.
        return made.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else made

    return QueryChunk(
        stop=stop, rows=rows, query_offsets=offsets(queries), key_offsets=offsets(keys),
        most_queries=max(queries), most_keys=max(keys),
    )  # fmt: skip


def one_by_one(
    query: Tensor, key: Tensor, value: Tensor, chunk: QueryChunk, attend: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Tensor:
    """A call of `attend` for all documents of the same length, of all rows.

    Measured on one core: with documents of 16 tokens and more a call for each takes no longer than one with a mask,
    forward and backward, and with 16 documents in 2,048 tokens a twelfth. Captions of a dozen tokens are many, and most
    have a length that others have too. Each tensor is split at once: slices one by one would make as many gradients of
    full size as there are documents.

    Args:
        query: of the chunk, [Q, B, N, D].
        key, value: of rows from their beginning, [K, B, G, D] with K >= chunk.stop.
        attend: SdpaAttention._attend.
    Returns: [Q, B, N*D]
    """
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for row, q, k, v in zip(chunk.rows, query.split(1, dim=1), key.split(1, dim=1), value.split(1, dim=1), strict=True):
        sizes = [row.first_key, *row.keys, len(k) - chunk.stop]
        parts += zip(q.split(row.queries), k.split(sizes)[1:-1], v.split(sizes)[1:-1], strict=True)
    places = defaultdict[tuple[int, int], list[int]](list)
    for place, (q, k, _) in enumerate(parts):
        places[len(q), len(k)].append(place)
    made: dict[int, Tensor] = {}
    for some in places.values():
        q, k, v = (torch.cat(same, dim=1) for same in zip(*(parts[place] for place in some), strict=True))
        made |= zip(some, attend(q, k, v).split(1, dim=1), strict=True)
    of_rows = iter(made[place] for place in range(len(parts)))
    return torch.cat([torch.cat(list(islice(of_rows, len(row.queries)))) for row in chunk.rows], dim=1)


def all_at_once(query: Tensor, key: Tensor, value: Tensor, chunk: QueryChunk, scale: float | None) -> Tensor:
    """One call of flash attention for all documents, whose queries stand at the last of their keys. Shapes as in
    one_by_one.

    The operation is what torch.nn.attention.varlen calls, whose arguments differ between torch 2.10 and 2.13.
    """
    flat = _flat(query), *(_flat_keys(x, chunk) for x in (key, value))
    offsets = chunk.query_offsets, chunk.key_offsets, chunk.most_queries, chunk.most_keys
    out: Tensor = torch.ops.aten._flash_attention_forward(*flat, *offsets, 0.0, True, False, scale=scale)[0]
    return _rows(out, query)


def _flat(x: Tensor) -> Tensor:
    """[S, B, N, D] -> [B*S, N, D], row by row."""
    return x.transpose(0, 1).flatten(0, 1)


def _flat_keys(x: Tensor, chunk: QueryChunk) -> Tensor:
    if len(x) == chunk.stop and not any(row.first_key for row in chunk.rows):
        return _flat(x)
    return torch.cat([x[row.first_key : chunk.stop, at] for at, row in enumerate(chunk.rows)])


def _rows(out: Tensor, query: Tensor) -> Tensor:
    """[B*S, N, D] or [B*S, N*D] -> [S, B, N*D]"""
    return out.reshape(query.shape[1], query.shape[0], -1).transpose(0, 1).contiguous()


def by_transformer_engine(attention: type[Any]) -> type[Any]:
    """Transformer Engine's core attention (Megatron's TEDotProductAttention) that takes PackedDocuments too, as its
    format thd. Without context parallelism: there it would cut each document over the ranks, not the row."""

    class ByDocument(attention):  # type: ignore[misc]
        def forward(
            self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *rest: Any,
            packed_seq_params: PackedDocuments | None = None, **named: Any,
        ) -> Tensor:  # fmt: skip
            """[S, B, N, D] and twice [S, B, G, D] -> [S, B, N*D]"""
            if packed_seq_params is None:
                whole: Tensor = super().forward(query, key, value, attention_mask, *rest, **named)
                return whole
            (chunk,) = packed_seq_params.chunks
            thd = PackedSeqParams(
                qkv_format="thd", cu_seqlens_q=chunk.query_offsets, cu_seqlens_kv=chunk.key_offsets,
                max_seqlen_q=chunk.most_queries, max_seqlen_kv=chunk.most_keys,
            )  # fmt: skip
            flat = (_flat(x).contiguous() for x in (query, key, value))
            return _rows(super().forward(*flat, attention_mask, *rest, packed_seq_params=thd, **named), query)

    return ByDocument

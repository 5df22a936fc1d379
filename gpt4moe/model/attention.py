"""Core attention over torch's scaled_dot_product_attention: flash kernels on GPUs, without an extra package.

Under context parallelism a rank holds chunks c and 2 cp - 1 - c of a sequence (placement.sequence_chunks). It gathers
the keys and values and puts them in order. A chunk of queries sees the keys up to its end. One early and one late chunk
make the same work on every rank:

    key, value [S/cp, B, G, D] --all-gather, in order--> [S, B, G, D]
    query chunk n [S/2cp, B, N, D] x keys 0 .. n --> [S/2cp, B, N*D]

Keys and values of the whole sequence are kept for the backward pass, unless parallel.recompute=selective. Where flash
attention takes the call (16-bit floats on a GPU), it needs no mask. Elsewhere a rank keeps two masks, (2 cp + 1)
(S/2cp)^2 elements, the same for all layers: 42 MB in bf16 at S = 8,192 and cp = 2, 2.3 GB at 131,072 and 8. On GPUs
kernels.attention=transformer_engine passes keys and values around a ring instead.

Megatron's argument packed_seq_params, which every layer hands on unread, brings what attends in another way. While text
is generated, the keys and values of earlier tokens are in a cache: inference.attention attends to them
(CachedAttention). With data.document_mask a token sees its own document alone (model.documents).
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.backends.cuda import SDPAParams, can_use_flash_attention

from gpt4moe.model.documents import PackedDocuments, QueryChunk, all_at_once, one_by_one
from gpt4moe.parallel.collectives import AllGather
from gpt4moe.parallel.placement import sequence_chunks

CausalAttention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""SdpaAttention._attend: query, key, value -> output."""


class CachedAttention(Protocol):
    """Attention to the keys and values of a cache, in place of SdpaAttention's over whole sequences."""

    qkv_format: str
    """Not "thd": then Megatron would take it for its own packed_seq_params."""

    def attend(
        self, layer_number: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float | None,
        causal: CausalAttention,
    ) -> Tensor:  # fmt: skip
        """query [T, 1, N, D], key and value [T, 1, G, D], before the rotary embedding -> [T, 1, N*D].

        Args:
            layer_number: in the whole model, from 1.
        """

    def attend_mixed(self, layer_number: int, mixed: Tensor, *, scale: float | None, causal: CausalAttention) -> Tensor:
        """The same of what the first linear layer gives, [T, 1, G * (N / G + 2) * D]: of each group its queries, its
        key and its value."""


class SdpaAttention(nn.Module):
    """Causal attention of this rank's heads, as Megatron's SelfAttention calls its core. Owns no weights."""

    def __init__(
        self, config: Any, layer_number: int, *, pg_collection: Any, softmax_scale: float | None = None, **_: Any
    ):
        super().__init__()
        self.layer_number = layer_number
        self.softmax_scale = softmax_scale
        self.cp = pg_collection.cp

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
        packed_seq_params: CachedAttention | PackedDocuments | None = None, **_: Any,
    ) -> Tensor:  # fmt: skip
        """query [S/cp, B, N, D], key and value [S/cp, B, G, D] with G dividing N -> [S/cp, B, N*D]."""
        assert attention_mask is None, "training is causal over whole sequences"
        if isinstance(packed_seq_params, PackedDocuments):
            return self._by_document(query, key, value, packed_seq_params.chunks)
        if packed_seq_params is not None:
            return packed_seq_params.attend(
                self.layer_number, query, key, value, scale=self.softmax_scale, causal=self._attend
            )
        if self.cp.size() == 1:
            return self._attend(query, key, value)
        key, value = self._whole(key, value)
        size = query.shape[0] // 2
        ends = [(chunk + 1) * size for chunk in sequence_chunks(self.cp.size(), self.cp.rank())]
        parts = [self._attend(q, key[:end], value[:end]) for q, end in zip(query.chunk(2), ends, strict=True)]
        return torch.cat(parts)

    def attend_mixed(self, mixed: Tensor, attention: CachedAttention) -> Tensor:
        """forward with a cache, of queries, keys and values that are not apart."""
        return attention.attend_mixed(self.layer_number, mixed, scale=self.softmax_scale, causal=self._attend)

    def _by_document(self, query: Tensor, key: Tensor, value: Tensor, chunks: list[QueryChunk]) -> Tensor:
        if self.cp.size() > 1:
            key, value = self._whole(key, value)
        parts = []
        for q, chunk in zip(query.chunk(len(chunks)), chunks, strict=True):
            if chunk.is_plain:
                parts.append(self._attend(q, key[: chunk.stop], value[: chunk.stop]))
            elif _flash_takes(*(x.permute(1, 2, 0, 3) for x in (q, key, value))):
                parts.append(all_at_once(q, key, value, chunk, self.softmax_scale))
            else:
                attend = partial(self._attend, part_of=(len(q), chunk.stop))
                parts.append(one_by_one(q, key, value, chunk, attend))
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, *, part_of: tuple[int, int] | None = None) -> Tensor:
        """Attention of queries that stand at the last positions of the keys; each sees the keys up to its own.

        Args:
            part_of: queries and keys of the chunk that these are a part of, whose mask serves.
        """
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        num_queries, num_keys = q.shape[2], k.shape[2]
        if num_queries < num_keys and _flash_takes(q, k, v):
            # With a tensor as a mask and grouped queries torch has only the math kernel on GPUs, which keeps the scores
            # of all heads in fp32. This operation puts the queries at the last positions by itself. It is what torch
            # calls for torch.nn.attention.bias.causal_lower_right, which cannot be made under a FLOP counter.
            out = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, scale=self.softmax_scale)[0]
        else:
            # is_causal would put the queries at the first positions.
            mask = None
            if num_queries < num_keys:
                most_queries, most_keys = part_of or (num_queries, num_keys)
                first = (most_keys - most_queries) - (num_keys - num_queries)
                mask = _causal_mask(most_queries, most_keys, q.dtype, q.device)
                mask = mask[:num_queries, first : first + num_keys]
            out = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.softmax_scale,
                enable_gqa=q.shape[1] != k.shape[1],
            )  # fmt: skip
        return out.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)

    def _whole(self, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Those of all ranks in the order of the sequence: [S/cp, ...] -> [S, ...]."""
        cp = self.cp.size()
        chunks = AllGather.apply(torch.cat((key, value), dim=-1), self.cp).chunk(2 * cp)
        held = [chunk for rank in range(cp) for chunk in sequence_chunks(cp, rank)]
        return torch.cat([chunks[held.index(chunk)] for chunk in range(2 * cp)]).chunk(2, dim=-1)


def _flash_takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether flash attention takes a call without a mask. It takes head sizes that are multiples of 8."""
    if q.device.type != "cuda" or q.shape[-1] % 8:
        return False
    return can_use_flash_attention(_flash_call(q, k, v))


def _flash_call(q: Tensor, k: Tensor, v: Tensor) -> SDPAParams:
    """What torch is asked. Not is_causal: with fewer queries than keys torch would answer for queries at the first
    positions, and say no. torch.nn.attention.bias asks the same."""
    return SDPAParams(q, k, v, None, 0.0, False, q.shape[1] != k.shape[1])


@lru_cache(maxsize=2)
def _causal_mask(num_queries: int, num_keys: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What is added to the scores of the last queries: 0 up to the query's own position and -inf after it.

    A rank has two masks, made once for all layers and micro-batches, because autograd keeps the tensor that it gets.
    A bool mask would be worse: torch 2.13 turns it into floats in every call and keeps each of them.
    """
    later = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).triu(1 + num_keys - num_queries)
    return torch.zeros(num_queries, num_keys, dtype=dtype, device=device).masked_fill(later, -torch.inf)

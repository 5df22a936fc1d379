"""Core attention over torch's scaled_dot_product_attention: flash kernels on GPUs, no extra package.

Context parallelism: a rank holds chunks c and 2 cp - 1 - c of a sequence (placement.sequence_chunks). Keys and values
are gathered and put in order; a chunk of queries sees what comes before its end, so all ranks do the same work:

    key, value [S/cp, B, G, D] --all-gather, in order--> [S, B, G, D]
    query chunk n [S/2cp, B, N, D] x keys 0 .. n --> [S/2cp, B, N*D]

Keys and values of the whole sequence are kept for the backward pass, unless parallel.recompute=selective. On GPUs
kernels.attention=transformer_engine passes them around a ring instead.
"""

from typing import Any

import torch
from torch import Tensor, nn

from gpt4moe.parallel.collectives import AllGather
from gpt4moe.parallel.placement import sequence_chunks


class SdpaAttention(nn.Module):
    """Causal attention of this rank's heads, in Megatron's core-attention seam. Owns no weights."""

    def __init__(
        self, config: Any, layer_number: int, *, pg_collection: Any, softmax_scale: float | None = None, **_: Any
    ):
        super().__init__()
        self.softmax_scale = softmax_scale
        self.cp = pg_collection.cp

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: Any) -> Tensor:
        """query [S/cp, B, N, D], key and value [S/cp, B, G, D] with G dividing N -> [S/cp, B, N*D]."""
        assert attention_mask is None, "training is causal over whole sequences"
        if self.cp.size() == 1:
            return self._attend(query, key, value)
        key, value = self._whole(torch.cat((key, value), dim=-1)).chunk(2, dim=-1)
        size = query.shape[0] // 2
        ends = [(chunk + 1) * size for chunk in sequence_chunks(self.cp.size(), self.cp.rank())]
        parts = [self._attend(q, key[:end], value[:end]) for q, end in zip(query.chunk(2), ends, strict=True)]
        return torch.cat(parts)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Queries of the last positions of the keys, each of which sees the keys up to its own."""
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        num_queries, num_keys = q.shape[2], k.shape[2]
        mask = None
        if num_queries < num_keys:  # is_causal would put the queries at the first positions
            ones = torch.ones(num_queries, num_keys, dtype=torch.bool, device=q.device)
            mask = ones.tril(diagonal=num_keys - num_queries)
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.softmax_scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip
        return out.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)

    def _whole(self, x: Tensor) -> Tensor:
        """Rows of all ranks, [S/cp, ...] -> [S, ...], in the order of the sequence."""
        cp = self.cp.size()
        chunks = AllGather.apply(x, self.cp).chunk(2 * cp)
        held = [chunk for rank in range(cp) for chunk in sequence_chunks(cp, rank)]
        return torch.cat([chunks[held.index(chunk)] for chunk in range(2 * cp)])

"""Core attention over torch's scaled_dot_product_attention: flash kernels on GPUs, no extra package."""

from typing import Any

import torch
from torch import Tensor, nn


class SdpaAttention(nn.Module):
    """Causal attention of this rank's heads, in Megatron's core-attention seam. Owns no weights."""

    def __init__(self, config: Any, layer_number: int, *, softmax_scale: float | None = None, **_: Any):
        super().__init__()
        self.softmax_scale = softmax_scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: Any) -> Tensor:
        """query [S, B, N, D], key and value [S, B, G, D] with G dividing N -> [S, B, N*D]."""
        assert attention_mask is None, "training is causal over whole sequences"
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self.softmax_scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        return out.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)

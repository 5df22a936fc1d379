"""Gated cross-attention: text attends to the latents of images, before a layer (arXiv:2204.14198, figure 4).

    hidden + tanh(attention_gate) * attention(hidden, latents) -> + tanh(mlp_gate) * MLP

Gates begin at 0, so a text model with fresh blocks computes what it did before, to the bit. A token attends to the
latents of one image: the latest before it. A token before the first image gets 0 from the attention.

    hidden [S/tp, B, H] --linear_q over tp--> [S, B, N/tp, D]
    latents [M, B, W], whole on every tp rank --linear_kv over tp--> the backward pass sums their gradient over tp

It equals the layer of transformers' Idefics to round-off.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core.transformer import MegatronModule
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from gpt4moe.config.model import ModelConfig
from gpt4moe.model.linear import ColumnLinear, RowLinear
from gpt4moe.parallel.groups import ProcessGroups


class GatedCrossAttention(MegatronModule):  # type: ignore[misc]
    """The block before a layer. A MegatronModule: else Megatron saves its slices as if they were copies."""

    def __init__(self, config: Any, model: ModelConfig, groups: ProcessGroups, norm: type[nn.Module]):
        super().__init__(config)
        assert model.vision is not None
        self.num_latents, self.head_size = model.vision.resampler.num_latents, model.head_size
        hidden, heads, ffn = (
            model.hidden_size,
            model.num_attention_heads * model.head_size,
            model.vision.ffn_hidden_size,
        )
        made = {"bias": False, "skip_bias_add": False, "init_method": config.init_method, "tp_group": groups.tp}
        column, row = made | {"gather_output": False}, made | {"input_is_parallel": True}
        whole = copy.copy(config)
        whole.sequence_parallel = False  # latents are not cut along the sequence

        def normed() -> nn.Module:
            return norm(config=config, hidden_size=hidden, eps=config.layernorm_epsilon)

        self.attention_gate = nn.Parameter(torch.zeros(1, dtype=config.params_dtype))
        self.mlp_gate = nn.Parameter(torch.zeros(1, dtype=config.params_dtype))
        self.input_layernorm = normed()
        self.linear_q = ColumnLinear(hidden, heads, config=config, **column)
        self.linear_kv = ColumnLinear(model.vision.width, 2 * heads, config=whole, **column)
        self.linear_proj = RowLinear(heads, hidden, config=config, **row)
        self.pre_mlp_layernorm = normed()
        self.linear_fc1 = ColumnLinear(hidden, 2 * ffn, config=config, **column)
        self.linear_fc2 = RowLinear(ffn, hidden, config=config, **row)

    def forward(self, hidden: Tensor, latents: Tensor | None, media: Tensor | None) -> Tensor:
        """hidden [S/tp, B, H] -> the same shape.

        Args:
            latents: of each row's images, one after the other, [images * L, B, W]; zeros behind a row's last image.
                None: there are no images, and no parameter of the attention gets a gradient.
            media: [B, S], which image of its row each token attends to, from 1; 0: none.
        """
        if latents is None:
            return self.apply_to(hidden, None)
        assert media is not None
        return self.apply_to(hidden, partial(self._attend, latents, media))

    def apply_to(self, hidden: Tensor, attend: Callable[[Tensor], Tensor] | None) -> Tensor:
        """The block, by whatever its queries attend to: latents, or keys and values that were kept of them.

        Args:
            attend: queries [S, B, N/tp, D] -> [S, B, N/tp * D], 0 for tokens without an image; None: none has one.
        """
        if attend is not None:
            query = self.linear_q(self.input_layernorm(hidden))[0].unflatten(-1, (-1, self.head_size))
            hidden = hidden + self.attention_gate.tanh() * self.linear_proj(attend(query))[0]
        gate, up = self.linear_fc1(self.pre_mlp_layernorm(hidden))[0].chunk(2, dim=-1)
        return hidden + self.mlp_gate.tanh() * self.linear_fc2(nn.functional.silu(gate) * up)[0]

    def keys_values(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of latents [M, B, W], each [B, N/tp, M, D]."""
        key_value = self.linear_kv(latents)[0].unflatten(-1, (-1, 2 * self.head_size)).permute(1, 2, 0, 3)
        key, value = key_value.chunk(2, dim=-1)
        return key, value

    def _attend(self, latents: Tensor, media: Tensor, query: Tensor) -> Tensor:
        q = query.permute(1, 2, 0, 3)  # [B, N/tp, S, D]
        k, v = self.keys_values(latents)
        image = torch.arange(len(latents), device=media.device) // self.num_latents + 1
        has_image = media > 0
        # A token without an image attends to all, and the result is multiplied by 0: a softmax over nothing is NaN.
        mask = (media.unsqueeze(-1) == image) | ~has_image.unsqueeze(-1)
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask.unsqueeze(1))
        out = out * has_image[:, None, :, None]
        return out.permute(2, 0, 1, 3).flatten(2)


class VisionLayer(TransformerLayer):  # type: ignore[misc]
    """A layer of a vision model, which may have a gated block before it. It hands the latents on to the next one.

    Args:
        block: makes the gated block; None: this layer has none. Handed through ModuleSpec(params=...).
    """

    def __init__(self, config: Any, *given: Any, block: Any = None, **named: Any):
        super().__init__(config, *given, **named)
        self.gated_cross_attention = None if block is None else block(config)

    def forward(
        self, hidden_states: Tensor, *, context: Tensor | None = None, context_mask: Tensor | None = None, **rest: Any
    ) -> tuple[Tensor, Tensor | None]:
        """As TransformerBlock calls a layer.

        Args:
            context, context_mask: latents and media of GatedCrossAttention.
        """
        if self.gated_cross_attention is not None:
            hidden_states = self.gated_cross_attention(hidden_states, context, context_mask)
        hidden_states, _ = super().forward(hidden_states=hidden_states, **rest)
        return hidden_states, context

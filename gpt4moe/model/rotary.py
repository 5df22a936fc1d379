"""kernels.rotary=triton: the rotary embedding (arXiv:2104.09864) in one Triton kernel each way (rotary_kernels.py).

    mixed [S/cp, B, G, (R + 2) * D]: of each group R queries, a key and a value, as the projection makes them
      --split, queries and keys turned--> query [S/cp, B, G * R, D], key and value [S/cp, B, G, D]

Megatron's way (rope_utils) takes 39 kernels of torch for the same, forward and backward, and rounds sines and cosines
to the model's dtype; here they are fp32. With model.qk_norm the norms come in between, so queries and keys are turned
one after the other.
"""

import importlib
from functools import lru_cache
from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor
from torch.autograd.function import once_differentiable


class FusedRotaryAttention(SelfAttention):  # type: ignore[misc]
    """Megatron's self-attention, which turns queries and keys where it makes them. Owns no weights of its own."""

    table: Tensor | None = None
    """Of the call that runs: cosines and sines. None: nothing is turned here, as in the steps of generation."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None, *rest: Any, rotary_pos_emb: Tensor | None = None,
        **named: Any,
    ) -> Any:  # fmt: skip
        """As TransformerLayer calls its attention.

        Args:
            rotary_pos_emb: angles of the rank's positions, [S/cp, 1, 1, D], whose two halves are equal.
        """
        self.table = None if rotary_pos_emb is None else cosines_and_sines(rotary_pos_emb)
        try:
            return super().forward(hidden_states, attention_mask, *rest, rotary_pos_emb=None, **named)
        finally:
            self.table = None

    def get_query_key_value_tensors(self, hidden_states: Tensor, *rest: Any, **named: Any) -> Any:
        """hidden [S/tp/cp, B, H] -> query [S/cp, B, N, D], key and value [S/cp, B, G, D] of this rank's heads."""
        if self.table is None:
            return super().get_query_key_value_tensors(hidden_states, *rest, **named)
        if self.config.qk_layernorm:
            query, key, value = super().get_query_key_value_tensors(hidden_states, *rest, **named)
            return *(Rotary.apply(x.unsqueeze(3), self.table, False)[0] for x in (query, key)), value
        mixed, _ = self.linear_qkv(hidden_states)
        groups, width = self.num_query_groups_per_partition, self.hidden_size_per_attention_head
        return Rotary.apply(mixed.view(*mixed.shape[:2], groups, -1, width), self.table, True)


class Rotary(torch.autograd.Function):
    """mixed [S, B, G, R + 2, D] -> query, key, value; without has_key [S, B, G, R, D] -> query alone."""

    @staticmethod
    def forward(ctx: Any, mixed: Tensor, table: Tensor, has_key: bool) -> tuple[Tensor, ...]:
        assert mixed.shape[-1] == 2 * table.shape[-1] and len(mixed) == table.shape[1], "a table of other positions"
        ctx.table, ctx.shape = table, mixed.shape
        length, batch, groups, heads, width = mixed.shape
        query = mixed.new_empty(length, batch, groups * (heads - 2 * has_key), width)
        others = [mixed.new_empty(length, batch, groups, width) if has_key else None for _ in range(2)]
        kernels().split(mixed.contiguous(), table, query, *others)
        return query, *(other for other in others if other is not None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        # Flash attention's come with other strides, which the kernel takes.
        given = [one if one.stride(-1) == 1 else one.contiguous() for one in gradients]
        mixed = given[0].new_empty(ctx.shape)
        kernels().join(given[0], *(given[1:] or (None, None)), ctx.table, mixed)
        return mixed, None, None


@lru_cache(maxsize=32)
def cosines_and_sines(angles: Tensor) -> Tensor:
    """Angles [S, 1, 1, D] -> [2, S, D/2] fp32. A chunk keeps its angles, so all its layers and steps share a table."""
    half = angles[:, 0, 0, : angles.shape[-1] // 2].float()
    return torch.stack((half.cos(), half.sin()))


def kernels() -> Any:
    """The module of Triton's kernels."""
    return importlib.import_module("gpt4moe.model.rotary_kernels")

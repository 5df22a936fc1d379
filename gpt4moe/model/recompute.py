"""recompute=full: layers of which nothing but the input is kept for the backward pass.

Not Megatron's own loop over layers (TransformerBlock with recompute_granularity="full"): where it recomputes only the
first layers of a stage, it hands the others no padding_mask, so that these count padding as tokens and have no token
numbers to draw noise by (megatron-core 0.16.1).
"""

from typing import Any

from megatron.core import tensor_parallel
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor


class RecomputedLayer(TransformerLayer):  # type: ignore[misc]
    """A layer whose backward pass runs its forward pass again; in evaluation a plain one."""

    def forward(self, hidden_states: Tensor, *, padding_mask: Tensor | None = None, **rest: Any) -> Any:
        """As TransformerBlock calls a layer: (hidden [S/tp, B, H], None).

        Args:
            rest: nothing that a gradient flows to.
        """
        forward = super().forward

        def plain(hidden_states: Tensor, padding_mask: Tensor | None) -> Any:
            return forward(hidden_states=hidden_states, padding_mask=padding_mask, **rest)

        if not self.training:
            return plain(hidden_states, padding_mask)
        return tensor_parallel.checkpoint(plain, False, hidden_states, padding_mask)

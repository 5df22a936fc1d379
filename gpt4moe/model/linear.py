"""Megatron's linear layers as our specs use them: cheap without gradients, and with adapters where there are any."""

from typing import Any

import torch
from megatron.core import tensor_parallel
from torch import Tensor

from gpt4moe.model.adapters import Adapted


class ColumnLinear(Adapted, tensor_parallel.ColumnParallelLinear):  # type: ignore[misc]
    """Megatron's linear layer. Without gradients and tensor parallelism, as while text is generated, it is one product:
    Megatron's way there through three autograd functions costs a token as much time as the product."""

    def forward(self, input_: Tensor, *rest: Any, **named: Any) -> Any:
        """input_ [S, B, H] -> ([S, B, output], no bias)."""
        if torch.is_grad_enabled() or self.tp_group.size() > 1:
            output, bias = super().forward(input_, *rest, **named)
        else:
            output, bias = torch.matmul(input_, self.weight.t()), None
        return (output + self.added_to_columns(input_) if self.adapter_scale else output), bias


class RowLinear(Adapted, tensor_parallel.RowParallelLinear):  # type: ignore[misc]
    """As ColumnLinear."""

    def forward(self, input_: Tensor, *rest: Any, **named: Any) -> Any:
        """input_ [S, B, input] -> ([S, B, H], no bias)."""
        if torch.is_grad_enabled() or self.tp_group.size() > 1:
            output, bias = super().forward(input_, *rest, **named)
        else:
            output, bias = torch.matmul(input_, self.weight.t()), None
        return (output + self.added_to_rows(input_) if self.adapter_scale else output), bias

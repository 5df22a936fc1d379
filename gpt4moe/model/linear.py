"""Megatron's linear layers as our specs use them: cheap without gradients, and with adapters where there are any."""

from typing import Any

import torch
from megatron.core import tensor_parallel
from torch import Tensor

from gpt4moe.model.adapters import Adapted


class _Linear(Adapted):
    """Without gradients and tensor parallelism, as while text is generated, a layer is one product: Megatron's way
    there through three autograd functions costs a token as much time as the product."""

    weight: Tensor

    def added(self, x: Tensor) -> Tensor:
        """What the adapter adds."""
        raise NotImplementedError

    def forward(self, input_: Tensor, *rest: Any, **named: Any) -> Any:
        """input_ [S, B, input] -> ([S, B, output], no bias)."""
        if torch.is_grad_enabled() or self.tp_group.size() > 1:
            output, bias = super().forward(input_, *rest, **named)  # type: ignore[misc]
        else:
            output, bias = torch.matmul(input_, self.weight.t()), None
        return (output + self.added(input_) if self.adapter_scale else output), bias


class ColumnLinear(_Linear, tensor_parallel.ColumnParallelLinear):  # type: ignore[misc]
    def added(self, x: Tensor) -> Tensor:
        return self.added_to_columns(x)


class RowLinear(_Linear, tensor_parallel.RowParallelLinear):  # type: ignore[misc]
    def added(self, x: Tensor) -> Tensor:
        return self.added_to_rows(x)

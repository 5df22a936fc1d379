"""Megatron's linear layers as our specs use them: cheap without gradients, and with adapters where there are any.

fuse_weight_gradients: their weights' gradients, and those of experts, add themselves to Megatron's fp32 buffers.
"""

from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel import layers
from torch import Tensor, nn

from gpt4moe.model.adapters import Adapted
from gpt4moe.moe import weight_gradients
from gpt4moe.moe.experts import Experts


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


class _Products:
    """What Megatron calls of apex's extension fused_weight_gradient_mlp_cuda, by torch's product."""

    @staticmethod
    def wgrad_gemm_accum_fp32(x: Tensor, grad: Tensor, main_grad: Tensor) -> None:
        weight_gradients.add_product(main_grad, grad, x)


def fuse_weight_gradients(chunk: nn.Module) -> None:
    """From now on the chunk's linear layers and experts add the gradients of their weights to main_grad themselves.

    Call it after Megatron's DDP has wrapped the chunk. Frozen weights have no main_grad. The output layer of tied
    embeddings has no weight of its own on one stage: the embedding's gradient comes from two places, and stays plain.
    """
    # Megatron's own linear layers do all the rest, such as to gather the input again while the product runs.
    layers.fused_weight_gradient_mlp_cuda = _Products
    for module in chunk.modules():
        if isinstance(module, layers.ColumnParallelLinear | layers.RowParallelLinear):
            module.gradient_accumulation_fusion = hasattr(module.weight, "main_grad")
        elif isinstance(module, Experts):
            for parameter in (module.gate_up, module.down):
                if hasattr(parameter, "main_grad"):
                    weight_gradients.mark(parameter)

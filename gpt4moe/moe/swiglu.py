"""silu(gate) * up, times the router's weight: SwiGLU's activation (arXiv:2002.05202, equation 5), computed in fp32.

WeightedSwiGlu   torch's operations: each reads and writes all rows again
FusedSwiGlu      one Triton kernel each way (swiglu_kernels.py), for GPUs
"""

import importlib
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gpt4moe.config.kernels import SwiGluKernel


class WeightedSwiGlu(torch.autograd.Function):
    """silu(gate) * up * weight for hidden = [gate, up], [N, 2F], and weight [N, 1]; keeps only its inputs."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        return weighted_swiglu(hidden, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor, Tensor]:
        return weighted_swiglu_backward(gradient[0], *ctx.saved_tensors)[:2]


class FusedSwiGlu(torch.autograd.Function):
    """WeightedSwiGlu in one kernel each way: no fp32 copy of the rows is made."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        hidden, weight = hidden.contiguous(), weight.contiguous()
        ctx.save_for_backward(hidden, weight)
        out = hidden.new_empty(hidden.shape[0], hidden.shape[1] // 2)
        kernels().activation(hidden, weight, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor, Tensor]:
        hidden, weight = ctx.saved_tensors
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.empty_like(weight)
        kernels().gradients(gradient[0].contiguous(), hidden, weight, grad_hidden, grad_weight)
        return grad_hidden, grad_weight


def kernels() -> Any:
    """The module of Triton's kernels."""
    return importlib.import_module("gpt4moe.moe.swiglu_kernels")


ACTIVATIONS: dict[SwiGluKernel, type[torch.autograd.Function]] = {
    SwiGluKernel.torch: WeightedSwiGlu,
    SwiGluKernel.triton: FusedSwiGlu,
}


def weighted_swiglu(hidden: Tensor, weight: Tensor) -> Tensor:
    """[N, 2F], [N, 1] fp32 -> [N, F] of hidden's dtype, computed in fp32."""
    gate, up = hidden.float().chunk(2, dim=-1)
    return torch.nn.functional.silu(gate).mul_(up).mul_(weight).to(hidden.dtype)


def weighted_swiglu_backward(grad: Tensor, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden and weight, and silu(gate) * up in fp32, computed on the way."""
    gate, up = hidden.float().chunk(2, dim=-1)
    silu = torch.nn.functional.silu(gate)
    activation = silu * up
    grad_weight = (grad * activation).sum(dim=-1, keepdim=True)
    grad_hidden = torch.empty_like(hidden, dtype=torch.float32)
    grad_gate, grad_up = grad_hidden.chunk(2, dim=-1)
    grad_weighted = grad * weight
    torch.mul(grad_weighted, silu, out=grad_up)
    torch.ops.aten.silu_backward.grad_input(grad_weighted.mul_(up), gate, grad_input=grad_gate)
    return grad_hidden.to(hidden.dtype), grad_weight, activation

"""silu(gate) * up, times the router's weight: SwiGLU's activation (arXiv:2002.05202, equation 5), computed in fp32."""

from typing import Any

import torch
from torch import Tensor


class WeightedSwiGlu(torch.autograd.Function):
    """silu(gate) * up * weight for hidden = [gate, up], [N, 2F], and weight [N, 1]; keeps only its inputs."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        return weighted_swiglu(hidden, weight)

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor, Tensor]:
        return weighted_swiglu_backward(gradient[0], *ctx.saved_tensors)[:2]


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

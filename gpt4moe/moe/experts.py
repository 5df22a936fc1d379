"""The SwiGLU experts of one rank: two grouped matrix products around a weighted activation.

Shapes: N rows routed here, sorted by expert; H hidden, F ffn, L local experts. Weights as stored: gate and up merged,
gate_up [L, 2F, H], down [L, H, F].

The router's weight multiplies the activation, not the output: down(w * a) = w * down(a), and neither the experts'
outputs nor a [T, K, H] fp32 product need to be kept for the backward pass.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gpt4moe.config.training import ExpertKernel


class Experts(nn.Module):
    """Owns gate_up and down of the local experts."""

    def __init__(self, gate_up: nn.Parameter, down: nn.Parameter, kernel: ExpertKernel):
        super().__init__()
        self.gate_up = gate_up
        self.down = down
        self.kernel = kernel

    def forward(self, x_NH: Tensor, weight_N1: Tensor, counts_L: Tensor) -> Tensor:
        """Expert outputs times the router's weights, [N, H].

        Args:
            x_NH: rows sorted by local expert.
            weight_N1: fp32.
            counts_L: rows of each local expert, int; zero is fine, its gradient is zeros.
        """
        product = GROUPED_PRODUCTS[self._kernel_for(x_NH)]
        hidden = product(x_NH, self.gate_up, counts_L)
        return product(WeightedSwiGlu.apply(hidden, weight_N1), self.down, counts_L)

    def _kernel_for(self, x_NH: Tensor) -> ExpertKernel:
        if self.kernel is not ExpertKernel.auto:
            return self.kernel
        fast = x_NH.is_cuda and x_NH.dtype is torch.bfloat16
        return ExpertKernel.grouped_mm if fast else ExpertKernel.per_expert


class WeightedSwiGlu(torch.autograd.Function):
    """silu(gate) * up * weight for hidden = [gate, up], computed in fp32; keeps only its inputs.

    hidden [N, 2F], weight [N, 1] fp32 -> [N, F]. SwiGLU: arXiv:2002.05202, equation 5.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        gate, up = hidden.float().chunk(2, dim=-1)
        return (torch.nn.functional.silu(gate) * up).mul_(weight).to(hidden.dtype)

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor, Tensor]:
        hidden, weight = ctx.saved_tensors
        gate, up = hidden.float().chunk(2, dim=-1)
        grad = gradient[0].float()
        sigmoid = torch.sigmoid(gate)
        silu = gate * sigmoid
        grad_weight = (grad * silu).mul_(up).sum(dim=-1, keepdim=True)
        grad = grad * weight
        grad_hidden = torch.empty_like(hidden, dtype=torch.float32)
        grad_gate, grad_up = grad_hidden.chunk(2, dim=-1)
        torch.mul(grad, silu, out=grad_up)
        # d silu = sigmoid * (1 + gate * (1 - sigmoid)) = sigmoid + silu * (1 - sigmoid)
        torch.mul(grad.mul_(up), silu.mul_(1 - sigmoid).add_(sigmoid), out=grad_gate)
        return grad_hidden.to(hidden.dtype), grad_weight


class PerExpertProduct(torch.autograd.Function):
    """x @ weight[e].T for each expert's rows, written into slices of one output.

    Indexing weight[e] instead would make a full-size zero gradient per expert, the square of their number in all.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.counts = counts
        out = x.new_empty(x.shape[0], weight.shape[1])
        for expert, rows in _slices(counts):
            torch.mm(x[rows], weight[expert].t(), out=out[rows])
        return out

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        grad = gradient[0].contiguous()
        grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight)
        for expert, rows in _slices(ctx.counts):
            torch.mm(grad[rows], weight[expert], out=grad_x[rows])
            torch.mm(grad[rows].t(), x[rows], out=grad_weight[expert])
        return grad_x, grad_weight, None


def _slices(counts: list[int]) -> list[tuple[int, slice]]:
    ends = torch.tensor(counts).cumsum(0).tolist()
    return [(expert, slice(end - count, end)) for expert, (count, end) in enumerate(zip(counts, ends, strict=True))]


def _per_expert(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    return PerExpertProduct.apply(x, weight, counts.tolist())


def _grouped_mm(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    ends = torch.cumsum(counts, 0).to(torch.int32)
    return torch.nn.functional.grouped_mm(x, weight.transpose(1, 2), offs=ends)


# [N, I] x [L, O, I] -> [N, O]
GROUPED_PRODUCTS: dict[ExpertKernel, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    ExpertKernel.per_expert: _per_expert,
    ExpertKernel.grouped_mm: _grouped_mm,
}

"""The products of experts one by one, for devices without a grouped kernel. Shapes as in experts.py."""

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from gpt4moe.moe.swiglu import weighted_swiglu, weighted_swiglu_backward
from gpt4moe.moe.weight_gradients import WeightGradient, fused

CHUNK_BYTES, FP32_BYTES = 4 * 2**20, 4
"""Of hidden rows [N, 2F] in fp32 whose activation is computed at once: more would leave the caches."""


class PerExpert(torch.autograd.Function):
    """Computes a few experts after the other few: products for each expert, the activation for the rows of all of them.

    So activations, CHUNK_BYTES, are still in the cache when they are used, and experts of few rows do not pay for small
    operations. Products are written into slices of one output: indexing weight[e] under autograd instead would make a
    full-size zero gradient for each expert, E times E weights.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, counts: list[int], gate_up: Tensor, down: Tensor) -> Tensor:
        out = x.new_empty(x.shape[0], down.shape[1])
        ctx.chunks, hidden = chunks_of(counts, gate_up.shape[1]), []
        for at in ctx.chunks:
            hidden.append(x.new_empty(sum(at.counts), gate_up.shape[1]))
            _products(x[at.rows], gate_up[at.experts].transpose(1, 2), at.counts, hidden[-1])
            activation = weighted_swiglu(hidden[-1], weight[at.rows])
            _products(activation, down[at.experts].transpose(1, 2), at.counts, out[at.rows])
        ctx.save_for_backward(x, weight, gate_up, down, *hidden)
        ctx.parameters = fused(gate_up), fused(down)
        return out

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor, Tensor, None, Tensor | None, Tensor | None]:
        x, weight, gate_up, down, *hidden = ctx.saved_tensors
        grad = gradient[0].contiguous()
        grad_x, grad_weight = map(torch.empty_like, (x, weight))
        grad_gate_up, grad_down = (
            WeightGradient(value, parameter) if needed else None  # not of a frozen matrix
            for value, parameter, needed in zip((gate_up, down), ctx.parameters, ctx.needs_input_grad[3:], strict=True)
        )
        for at, of_chunk in zip(ctx.chunks, hidden, strict=True):
            grad_activation = of_chunk.new_empty(len(of_chunk), down.shape[2])
            _products(grad[at.rows], down[at.experts], at.counts, grad_activation)
            grad_hidden, grad_weight[at.rows], activation = weighted_swiglu_backward(
                grad_activation, of_chunk, weight[at.rows]
            )
            if grad_down is not None:
                weighted = activation.mul_(weight[at.rows]).to(grad.dtype)
                _outer_products(grad[at.rows], weighted, at.counts, grad_down, at.experts)
            _products(grad_hidden, gate_up[at.experts], at.counts, grad_x[at.rows])
            if grad_gate_up is not None:
                _outer_products(grad_hidden, x[at.rows], at.counts, grad_gate_up, at.experts)
        of_weights = (it.for_autograd() if it is not None else None for it in (grad_gate_up, grad_down))
        return grad_x, grad_weight, None, *of_weights


def _products(x: Tensor, weight: Tensor, counts: list[int], out: Tensor) -> None:
    """Each expert's rows [n, in] times its matrix [in, out], into its rows of `out`."""
    for x_rows, matrix, out_rows in zip(x.split(counts), weight.unbind(), out.split(counts), strict=True):
        torch.mm(x_rows, matrix, out=out_rows)


def _outer_products(grad: Tensor, x: Tensor, counts: list[int], of_weight: WeightGradient, experts: slice) -> None:
    """Each expert's gradient [out, in]: of its output's rows [n, out] and its input's [n, in]."""
    matrices = of_weight.memory[experts].unbind()
    for grad_rows, x_rows, matrix in zip(grad.split(counts), x.split(counts), matrices, strict=True):
        of_weight.product(grad_rows, x_rows, matrix)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Neighbouring experts."""

    experts: slice
    counts: list[int]
    """Rows of each."""
    rows: slice
    """Of all of them."""


def chunks_of(counts: list[int], width: int) -> list[Chunk]:
    """Chunks of as many experts as have CHUNK_BYTES of hidden rows [n, width] together, or of one."""
    limit = CHUNK_BYTES // (FP32_BYTES * width)
    chunks, first, begin, end = [], 0, 0, 0
    for expert, count in enumerate(counts):
        if expert > first and end + count - begin > limit:
            chunks.append(Chunk(slice(first, expert), counts[first:expert], slice(begin, end)))
            first, begin = expert, end
        end += count
    return [*chunks, Chunk(slice(first, len(counts)), counts[first:], slice(begin, end))]


class PerExpertProduct(torch.autograd.Function):
    """Rows [N, in], sorted by expert, times weight [L, out, in]: [N, out]. Makes only the gradients that are needed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
        out = x.new_empty(x.shape[0], weight.shape[1])
        for expert, rows in slices(counts):
            torch.mm(x[rows], weight[expert].t(), out=out[rows])
        ctx.save_for_backward(x, weight)
        ctx.counts, ctx.parameter = counts, fused(weight)
        return out

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        grad = gradient[0].contiguous()
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        of_weight = WeightGradient(weight, ctx.parameter) if ctx.needs_input_grad[1] else None
        for expert, rows in slices(ctx.counts):
            if grad_x is not None:
                torch.mm(grad[rows], weight[expert], out=grad_x[rows])
            if of_weight is not None:
                of_weight.product(grad[rows], x[rows], of_weight.memory[expert])
        return grad_x, of_weight.for_autograd() if of_weight is not None else None, None


def slices(counts: list[int]) -> list[tuple[int, slice]]:
    """(expert, its rows) of each local expert."""
    ends = list(accumulate(counts))
    return [(expert, slice(end - count, end)) for expert, (count, end) in enumerate(zip(counts, ends, strict=True))]

"""Triton's kernels of swiglu.FusedSwiGlu, one each way. Triton is imported here, so only where they are chosen.

A program has one row: gate and up of an assignment, [2F], and its router's weight. It reads and writes each element
once, computes in fp32, and adds in one order, so that equal runs are equal.
"""

import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 1024
"""Of F that a program has in registers."""


@triton.jit
def _forward(hidden, weight, out, width, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)  # N x 2F elements may be more than 2^31
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    gate = tl.load(hidden + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(hidden + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
    activation = gate / (1 + tl.exp(-gate)) * up * tl.load(weight + row)
    tl.store(out + row * width + column, activation.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward(grad, hidden, weight, grad_hidden, grad_weight, width, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    of_row = tl.load(weight + row)
    total = tl.zeros((COLUMNS,), dtype=tl.float32)
    for start in range(0, width, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = column < width
        gate = tl.load(hidden + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(hidden + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
        given = tl.load(grad + row * width + column, mask=inside, other=0.0).to(tl.float32)
        sigmoid = 1 / (1 + tl.exp(-gate))
        silu = gate * sigmoid
        total += given * silu * up
        given *= of_row
        grad_gate = given * up * sigmoid * (1 + gate * (1 - sigmoid))
        at = grad_hidden + row * 2 * width + column
        tl.store(at, grad_gate.to(grad_hidden.dtype.element_ty), mask=inside)
        tl.store(at + width, (given * silu).to(grad_hidden.dtype.element_ty), mask=inside)
    tl.store(grad_weight + row, tl.sum(total))


def activation(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    """hidden [N, 2F], weight [N, 1] fp32 -> out [N, F]; all contiguous."""
    rows, width = out.shape
    if out.numel():
        _forward[(rows, triton.cdiv(width, COLUMNS))](hidden, weight, out, width, COLUMNS=COLUMNS)


def gradients(grad: Tensor, hidden: Tensor, weight: Tensor, grad_hidden: Tensor, grad_weight: Tensor) -> None:
    """grad [N, F] -> grad_hidden [N, 2F], grad_weight [N, 1] fp32; all contiguous."""
    rows, width = grad.shape
    if grad.numel():
        _backward[(rows,)](grad, hidden, weight, grad_hidden, grad_weight, width, COLUMNS=COLUMNS)

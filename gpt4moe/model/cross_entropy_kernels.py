"""Triton's kernels of cross_entropy.CrossEntropy, one each way. Triton is imported here, so only where they are chosen.

A program of the forward pass has one token: it reads its logits once, with a running maximum. One of the backward pass
has COLUMNS of a token's logits. Both compute in fp32.
"""

import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 4096
"""Of the vocabulary that a program has in registers."""


@triton.jit
def _forward(logits, label, log_sum, picked, first, width, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    most, total = -float("inf"), 0.0
    for start in range(0, width, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        x = tl.load(logits + row * width + column, mask=column < width, other=-float("inf")).to(tl.float32)
        larger = tl.maximum(most, tl.max(x))
        total = total * tl.exp(most - larger) + tl.sum(tl.exp(x - larger))
        most = larger
    at = tl.load(label + row) - first
    found = tl.load(logits + row * width + at, mask=(at >= 0) & (at < width), other=0.0)
    tl.store(log_sum + row, most + tl.log(total))
    tl.store(picked + row, found.to(tl.float32))


@triton.jit
def _backward(given, logits, label, log_sum, grad, first, width, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    x = tl.load(logits + row * width + column, mask=inside, other=-float("inf")).to(tl.float32)
    share = tl.exp(x - tl.load(log_sum + row))
    share -= tl.where(column == tl.load(label + row) - first, 1.0, 0.0)
    value = (share * tl.load(given + row)).to(grad.dtype.element_ty)
    tl.store(grad + row * width + column, value, mask=inside)


def sums(logits: Tensor, label: Tensor, found: Tensor, first: int) -> None:
    """logits [T, V/tp], label [T] int64 -> found [2, T] fp32: log of the sum of exp, and the label's logit, 0 where
    another rank has it; all contiguous.

    Args:
        first: the vocabulary's number of column 0.
    """
    if logits.numel():
        _forward[(len(logits),)](logits, label, found[0], found[1], first, logits.shape[1], COLUMNS=COLUMNS)


def gradients(given: Tensor, logits: Tensor, label: Tensor, log_sum: Tensor, grad: Tensor, first: int) -> None:
    """given [T] fp32, the gradient of each token's loss; log_sum [T] of the whole vocabulary -> grad [T, V/tp]."""
    if logits.numel():
        blocks = triton.cdiv(logits.shape[1], COLUMNS)
        _backward[(len(logits), blocks)](
            given, logits, label, log_sum, grad, first, logits.shape[1], COLUMNS=COLUMNS
        )  # fmt: skip

"""Rows of several experts, each times its expert's matrix.

    one expert on this rank      one dense product: nothing is grouped
    several, small products      torch's grouped_mm: one kernel for all, and the host need not know the rows
    several, large products      on a GPU one dense product each: cuBLAS's reach more of the peak than grouped ones do

Letters: N rows sorted by expert, L local experts.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gpt4moe.moe.expert_rows import ExpertRows
from gpt4moe.moe.weight_gradients import WeightGradient, add_grouped_product, fused
from gpt4moe.parallel.kernel_problems import has_grouped_product

LARGE_FLOPS = 2e10
"""Of one expert's product, on average, from which each has a kernel of its own: 30 us at 72% of an H200's peak, ten of
the shortest kernels. From the data sheet and assumed shares (gpu_rehearsal.roofline); not measured."""


def grouped_product(x: Tensor, weight: Tensor, rows: ExpertRows) -> Tensor:
    """Rows x [N, in] times weight [L, out, in]: [N, out]."""
    is_fused = fused(weight) is not None and weight.requires_grad
    if is_fused or separate(x, weight.shape, rows) is not None:
        return GroupedProduct.apply(x, weight, rows)  # type: ignore[no-any-return]
    return torch.nn.functional.grouped_mm(x, weight.transpose(1, 2), offs=rows.ends)


class GroupedProduct(torch.autograd.Function):
    """Makes only the gradients that are needed; that of a marked weight is added to its fp32 buffer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, rows: ExpertRows) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.rows, ctx.parameter = rows, fused(weight)
        return products(x, weight.transpose(1, 2), rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (x, weight), grad = ctx.saved_tensors, gradient[0].contiguous()
        grad_x = products(grad, weight, ctx.rows) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return grad_x, None, None
        into = WeightGradient(weight, ctx.parameter)
        counts = separate(x, weight.shape, ctx.rows)
        if counts is not None:
            for matrix, grad_rows, x_rows in zip(
                into.memory.unbind(), parts(grad, counts), parts(x, counts), strict=True
            ):
                into.product(grad_rows, x_rows, matrix)
        else:
            add_grouped_product(into.memory, grad, x, ctx.rows)
        return grad_x, into.for_autograd(), None


def products(x: Tensor, matrices: Tensor, rows: ExpertRows) -> Tensor:
    """x [N, in] times matrices [L, in, out]: [N, out]; rows behind the last expert's are memory without values, as
    torch's grouped product leaves them. No gradient."""
    counts = separate(x, matrices.shape, rows)
    if counts is None:
        return torch.nn.functional.grouped_mm(x, matrices, offs=rows.ends)
    if len(counts) == 1:
        return torch.mm(x, matrices[0])
    out = x.new_empty(len(x), matrices.shape[2])
    for x_rows, matrix, out_rows in zip(parts(x, counts), matrices.unbind(), parts(out, counts), strict=True):
        torch.mm(x_rows, matrix, out=out_rows)
    return out


def separate(x: Tensor, shape: torch.Size, rows: ExpertRows) -> list[int] | None:
    """Number of each expert's rows where each has a product of its own; None: they are grouped.

    Args:
        shape: of the matrices.
    """
    if shape[0] == 1:
        return [len(x)]
    if rows.is_aligned and not are_separate(len(x), shape, x.device):
        return None
    return rows.listed


def parts(values: Tensor, counts: list[int]) -> tuple[Tensor, ...]:
    """The rows of each expert. Those behind the last are nobody's: a grouped product may have left NaNs there."""
    return values[: sum(counts)].split(counts)


def are_separate(num_rows: int, shape: torch.Size, device: torch.device) -> bool:
    """Whether experts of matrices [L, out, in] have a product each, for so many rows of all of them."""
    if device.type != "cuda" or shape[0] == 1:
        return shape[0] == 1
    # Elsewhere torch's grouped product copies the ends to the host itself, each time.
    is_one_kernel = has_grouped_product(torch.cuda.get_device_capability(device))
    return not is_one_kernel or 2 * num_rows * shape[1] * shape[2] >= LARGE_FLOPS * shape[0]

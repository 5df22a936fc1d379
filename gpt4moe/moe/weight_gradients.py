"""kernels.weight_gradients=fused: the product that makes a weight's gradient adds it to Megatron's fp32 buffer.

    torch   grad.T @ x -> gradient in the weight's dtype -> Megatron's hook adds it to main_grad     12 bytes an element
    fused   main_grad += grad.T @ x                                                                   8 bytes an element

(bf16; written once, read once, and main_grad read and written.) The fused sum is not rounded to bf16 on its way.

The contract is Megatron's gradient_accumulation_fusion: main_grad has the sum, grad_added_to_main_grad says so, and
autograd gets memory without values in the gradient's place. So the hook that starts a bucket's reduction runs as
ever, and adds nothing. model.linear does the same for Megatron's linear layers.

Letters: N rows sorted by expert, L local experts.
"""

import importlib
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

MOST_ROWS = 3600
"""Of an expert, on average. With more of them, torch's grouped product and an addition are taken, where the former is
one kernel: the product then takes longer than the buffer, and torch's is assumed to be faster than ours (60% of the
peak against 50%, gpu_rehearsal.roofline). From the data sheet of an H200; not measured."""


def mark(parameter: Any) -> None:
    """From now on the gradient of an expert's weight goes to its main_grad, which Megatron's DDP has made."""
    assert parameter.main_grad.dtype == torch.float32
    parameter.is_fused = True


class WeightGradient:
    """The gradient of one weight in one backward pass: in memory of its own, or added to its parameter's buffer.

    Args:
        parameter: as `fused` gave it in the forward pass.
    """

    def __init__(self, weight: Tensor, parameter: Any):
        self.parameter = parameter
        self.memory = torch.empty_like(weight) if parameter is None else parameter.main_grad

    def product(self, grad: Tensor, x: Tensor, into: Tensor) -> None:
        """grad [n, out], x [n, in] -> `into`, a part of self.memory, [out, in]."""
        if self.parameter is None:
            torch.mm(grad.t(), x, out=into)
        else:
            add_product(into, grad, x)

    def for_autograd(self) -> Tensor:
        """What a backward pass returns; after the last product."""
        if self.parameter is None:
            return self.memory
        self.parameter.grad_added_to_main_grad = True
        return torch.empty(self.parameter.shape, dtype=self.parameter.dtype, device=self.parameter.device)


def fused(weight: Tensor) -> Any:
    """The weight itself if it is marked, else None. For a forward pass to keep on ctx: what a checkpoint makes of saved
    tensors are copies without marks."""
    return weight if getattr(weight, "is_fused", False) else None


def add_product(into: Tensor, grad: Tensor, x: Tensor) -> None:
    """into [out, in] fp32 += grad [n, out].T @ x [n, in]. CPUs have no bf16 product with an fp32 result."""
    if grad.dtype is into.dtype:
        into.addmm_(grad.t(), x)
    elif into.device.type == "cuda":
        torch.addmm(into, grad.t(), x, out_dtype=into.dtype, out=into)
    else:
        into.add_(grad.t() @ x)


def add_grouped_product(into: Tensor, grad: Tensor, x: Tensor, ends: Tensor) -> None:
    """into [L, out, in] fp32 += each expert's grad.T @ x.

    Args:
        grad, x: [N, out], [N, in].
        ends: [L] int32, where the rows of each expert end.
    """
    if into.device.type == "cuda":
        if len(x) > MOST_ROWS * len(into) and torch.cuda.get_device_capability(into.device)[0] in (9, 10):
            into.add_(torch.nn.functional.grouped_mm(grad.t(), x, offs=ends))
        else:
            kernels().add(into, grad.contiguous(), x.contiguous(), ends)
        return
    start = 0
    for matrix, end in zip(into.unbind(), ends.tolist(), strict=True):
        add_product(matrix, grad[start:end], x[start:end])
        start = end


class GroupedProduct(torch.autograd.Function):
    """Rows x [N, in] times marked weight [L, out, in]: [N, out]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, ends)
        ctx.parameter = fused(weight)
        return torch.nn.functional.grouped_mm(x, weight.transpose(1, 2), offs=ends)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (x, weight, ends), grad = ctx.saved_tensors, gradient[0].contiguous()
        grad_x = torch.nn.functional.grouped_mm(grad, weight, offs=ends) if ctx.needs_input_grad[0] else None
        into = WeightGradient(weight, ctx.parameter)
        add_grouped_product(into.memory, grad, x, ends)
        return grad_x, into.for_autograd(), None


def grouped_product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows x [N, in] times weight [L, out, in]: [N, out]."""
    if fused(weight) is not None and weight.requires_grad:
        return GroupedProduct.apply(x, weight, ends)  # type: ignore[no-any-return]
    return torch.nn.functional.grouped_mm(x, weight.transpose(1, 2), offs=ends)


def kernels() -> Any:
    """The module of Triton's kernel."""
    return importlib.import_module("gpt4moe.moe.weight_gradient_kernels")

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

from gpt4moe.moe.expert_rows import ExpertRows


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


def add_grouped_product(into: Tensor, grad: Tensor, x: Tensor, rows: ExpertRows) -> None:
    """into [L, out, in] fp32 += each expert's grad.T @ x, of grad [N, out] and x [N, in]."""
    if into.device.type == "cuda":
        kernels().add(into, grad.contiguous(), x.contiguous(), rows.ends)
        return
    start = 0
    for matrix, count in zip(into.unbind(), rows.listed, strict=True):
        add_product(matrix, grad[start : start + count], x[start : start + count])
        start += count


def kernels() -> Any:
    """The module of Triton's kernel."""
    return importlib.import_module("gpt4moe.moe.weight_gradient_kernels")

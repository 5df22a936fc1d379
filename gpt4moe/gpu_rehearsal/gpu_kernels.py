"""Kernels that a CUDA build of torch, or Triton, would run, as a CPU build on fake tensors cannot choose them.

scaled_dot_product_attention   flash attention where CUDA takes it, else math with its scores in memory
rms_norm                       one kernel each way
SwiGluKernels, RotaryKernels, CrossEntropyKernels, RouterKernels, WeightGradientKernels   what ours read and write
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gpt4moe.gpu_rehearsal import places
from gpt4moe.gpu_rehearsal.costs import size_bytes
from gpt4moe.gpu_rehearsal.recorder import Notes, Recorder
from gpt4moe.parallel.kernel_problems import WIDEST_FLASH_HEAD

_HALF = (torch.bfloat16, torch.float16)


def active() -> Recorder | None:
    """The recorder of the step that runs, if any."""
    modes = torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    return next((mode for mode in modes if isinstance(mode, Recorder)), None)


_MATH = torch.nn.functional.scaled_dot_product_attention
"""On fake tensors a CPU build chooses the math kernel."""


def attention(notes: Notes) -> Any:
    """A scaled_dot_product_attention that notes which kernel each call takes."""

    def scaled_dot_product_attention(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        why = _why_not_flash(query, attn_mask)
        if why is None:
            notes.attention["flash", 0] += 1
            return torch.ops.aten._scaled_dot_product_flash_attention(
                query, key, value, dropout_p, is_causal or attn_mask is not None, False, scale=scale
            )[0]
        # The memory-efficient kernel knows no grouped queries. It keeps no scores.
        kernel = "math" if enable_gqa else "memory-efficient"
        scores = 4 * query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2] if enable_gqa else 0
        notes.attention[f"{kernel}: {why}{' with grouped queries' if enable_gqa else ''}", scores] += 1
        return _MATH(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)

    return scaled_dot_product_attention


def can_use_flash_attention(notes: Notes) -> Any:
    """What model.attention asks before it calls flash attention itself. A CPU build of torch always says no.

    As a CUDA build does, it says no to is_causal where queries and keys differ in number.
    """

    def can_use_flash_attention(call: Any) -> bool:
        is_square = call.query.shape[2] == call.key.shape[2]
        is_flash = _why_not_flash(call.query, call.attn_mask) is None and (is_square or not call.is_causal)
        if is_flash:
            notes.attention["flash", 0] += 1
        return is_flash

    return can_use_flash_attention


def quarters(documents: Tensor) -> list[list[int]]:
    """The lengths of the documents of each row, whose values are not known: four of equal length."""
    rows, length = documents.shape
    return [[length // 4] * 3 + [length - 3 * (length // 4)]] * rows


def _why_not_flash(query: Tensor, mask: Any) -> str | None:
    if query.dtype not in _HALF:
        return str(query.dtype).removeprefix("torch.")
    if query.shape[-1] > WIDEST_FLASH_HEAD:
        return f"heads of {query.shape[-1]}"
    if mask is None:
        return None
    return f"a mask {tuple(mask.shape)}"


class RmsNorm(torch.autograd.Function):
    """torch's CUDA kernel is one operation each way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, notes: Notes) -> Tensor:
        ctx.save_for_backward(x, weight)
        if weight.device != x.device:
            words = f"rms_norm mixes devices: input {x.device}, weight {weight.device} {tuple(weight.shape)}"
            notes.problem(places.here(), words)
        _count("_fused_rms_norm", "residual stream and norms", 2 * size_bytes(x))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        _count("_fused_rms_norm_backward", "residual stream and norms", 3 * size_bytes(x))
        return torch.empty_like(x), torch.empty_like(weight), None


def rms_norm(notes: Notes) -> Any:
    def forward(module: torch.nn.RMSNorm, x: Tensor) -> Tensor:
        return RmsNorm.apply(x, module.weight, notes)

    return forward


class SwiGluKernels:
    """moe.swiglu_kernels, on tensors without values."""

    @staticmethod
    def activation(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
        _launch("triton_swiglu", "SwiGLU", hidden, weight, out)

    @staticmethod
    def gradients(grad: Tensor, hidden: Tensor, weight: Tensor, grad_hidden: Tensor, grad_weight: Tensor) -> None:
        _launch("triton_swiglu_backward", "SwiGLU", grad, hidden, weight, grad_hidden, grad_weight)


class RotaryKernels:
    """model.rotary_kernels, on tensors without values."""

    @staticmethod
    def split(mixed: Tensor, table: Tensor, query: Tensor, key: Tensor | None, value: Tensor | None) -> None:
        _launch("triton_rotary", "rotary embedding", mixed, table, query, key, value)

    @staticmethod
    def join(query: Tensor, key: Tensor | None, value: Tensor | None, table: Tensor, mixed: Tensor) -> None:
        strided = [tensor for tensor in (query, key, value) if tensor is not None]
        _launch("triton_rotary_backward", "rotary embedding", table, mixed, strided=strided)


class CrossEntropyKernels:
    """model.cross_entropy_kernels, on tensors without values."""

    @staticmethod
    def sums(logits: Tensor, label: Tensor, found: Tensor, first: int) -> None:
        _launch("triton_cross_entropy", "cross-entropy", logits, label, found)

    @staticmethod
    def gradients(given: Tensor, logits: Tensor, label: Tensor, log_sum: Tensor, grad: Tensor, first: int) -> None:
        _launch("triton_cross_entropy_backward", "cross-entropy", given, logits, label, log_sum, grad)


class RouterKernels:
    """moe.routers.softmax_kernels, on tensors without values."""

    @staticmethod
    def choose(*tensors: Any) -> None:
        _launch("triton_router", "router", *tensors[:-1])

    @staticmethod
    def choice_gradients(*tensors: Any) -> None:
        _launch("triton_router_backward", "router", *tensors[:-1])


class WeightGradientKernels:
    """moe.weight_gradient_kernels, on tensors without values."""

    @staticmethod
    def add(into: Tensor, grad: Tensor, x: Tensor, ends: Tensor) -> None:
        products = 2.0 * grad.numel() * x.shape[1]
        # `into` is read and written.
        _launch("triton_grouped_gradient", "expert products", into, into, grad, x, ends, flops=products)


def _launch(
    name: str, part: str, *contiguous: Tensor | None, strided: Sequence[Tensor] = (), flops: float = 0.0
) -> None:
    """Counts a kernel that reads or writes each of these once, by its address on the GPU.

    Args:
        strided: tensors that may have any strides but the last.
    """
    recorder = active()
    if recorder is None:
        return
    touched = [*(tensor for tensor in contiguous if tensor is not None), *strided]
    for at, tensor in enumerate(touched):
        is_plain = tensor.is_contiguous() if at < len(touched) - len(strided) else tensor.stride(-1) == 1
        if tensor.device.type != "cuda" or not is_plain:
            words = f"{name} takes contiguous tensors on the GPU, not {tensor.device} {tuple(tensor.shape)}"
            recorder.notes.problem(places.here(), f"{words} of strides {tensor.stride()}")
    recorder.count(name, part, sum(map(size_bytes, touched)), flops)


def _count(name: str, part: str, memory_bytes: float) -> None:
    recorder = active()
    if recorder is not None:
        recorder.count(name, part, memory_bytes)


OURS: dict[str, type] = {
    "moe.swiglu": SwiGluKernels,
    "moe.routers.softmax_choice": RouterKernels,
    "model.rotary": RotaryKernels,
    "model.cross_entropy": CrossEntropyKernels,
    "moe.weight_gradients": WeightGradientKernels,
}
"""Module -> what its kernels() is on a fake GPU."""

"""The Triton kernels of the rotary embedding and the cross-entropy, in Triton's interpreter and compiled for GPUs."""

import importlib.util

import pytest

from tests.moe.test_swiglu_kernels import printed

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no triton: make test-triton")

VALUES = """
import os
import tempfile

import torch
from gpt4moe.model import cross_entropy_kernels, rotary_kernels
from tests.model.plain_kernels import CrossEntropyKernels, RotaryKernels

cross_entropy_kernels.COLUMNS = 16  # a row is then several blocks, the last one not full


def close(ours, plain):
    # One rounding of bf16 may fall to the neighbour; sums have another order.
    tolerance = 2**-7 if ours.dtype is torch.bfloat16 else 2e-6
    torch.testing.assert_close(ours, plain, rtol=tolerance, atol=tolerance)


for dtype in (torch.float32, torch.bfloat16):
    for length, batch, groups, queries, width in ((5, 2, 2, 3, 12), (3, 1, 3, 1, 8), (4, 2, 1, 4, 2), (0, 2, 2, 2, 8)):
        angles = 1000 * torch.rand(length, width // 2)
        table = torch.stack((angles.cos(), angles.sin()))
        for has_key in (True, False):
            mixed = torch.randn(length, batch, groups, queries + 2 * has_key, width).to(dtype)
            sizes = [groups * queries, groups, groups][: 3 if has_key else 1]
            results, gradients = [], []
            # As flash attention gives them: rows of the batch far apart.
            given = [torch.randn(batch, length, size, width).to(dtype).transpose(0, 1) for size in sizes]
            none = [None] * (3 - len(sizes))
            for kernels in (rotary_kernels, RotaryKernels):
                outs = [torch.full((length, batch, size, width), 7.0, dtype=dtype) for size in sizes]
                kernels.split(mixed, table, *outs, *none)
                results.append(outs)
                grad = torch.full_like(mixed, 7.0)
                kernels.join(*given, *none, table, grad)
                gradients.append(grad)
            for pair in (*zip(*results, strict=True), gradients):
                close(*pair)
    for rows, width, first in ((5, 40, 0), (4, 16, 16), (3, 7, 100), (0, 8, 0)):
        logits, label = (30 * torch.randn(rows, width)).to(dtype), torch.randint(0, 60, (rows,))
        given, found, grads = torch.rand(rows), [], []
        for kernels in (cross_entropy_kernels, CrossEntropyKernels):
            found.append(torch.full((2, rows), 7.0))
            kernels.sums(logits, label, found[-1], first)
            grads.append(torch.full_like(logits, 7.0))
            kernels.gradients(given, logits, label, found[-1][0], grads[-1], first)
        close(*found)
        close(*grads)
# Heads so far apart that the last one's place is no int32; the file has holes and takes no room.
with tempfile.NamedTemporaryFile() as file:
    os.truncate(file.name, 2 * (2**31 + 8))
    memory = torch.from_file(file.name, shared=True, size=2**31 + 8, dtype=torch.bfloat16)
    query = memory.as_strided((1, 1, 3, 8), (8, 8, 2**30, 1)).copy_(torch.randn(1, 1, 3, 8))
    table, gradients = torch.rand(2, 1, 4), [torch.empty(1, 1, 3, 1, 8, dtype=torch.bfloat16) for _ in range(2)]
    for kernels, grad in zip((rotary_kernels, RotaryKernels), gradients):
        kernels.join(query, None, None, table, grad)
    close(*gradients)
print("equal")
"""
COMPILES = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from gpt4moe.model import cross_entropy_kernels, rotary_kernels

sizes = dict.fromkeys(("batch", "length", "queries", "half", "width", "first"), "i32")
strides = {f"{name}_{axis}": "i32" for name in ("query", "key", "value") for axis in "sbn"}
bf16 = dict.fromkeys(("mixed", "query", "key", "value", "logits", "grad"), "*bf16")
fp32 = dict.fromkeys(("table", "log_sum", "picked", "given"), "*fp32")
types = {**sizes, **strides, **bf16, **fp32, "label": "*i64"}
rotary, columns = {"KEY_VALUE": True, "HEADS": 8, "HALF": 64}, {"COLUMNS": cross_entropy_kernels.COLUMNS}
for capability in (80, 90):
    for kernel, constants in (
        (rotary_kernels._split, rotary), (rotary_kernels._join, rotary), (cross_entropy_kernels._forward, columns),
        (cross_entropy_kernels._backward, columns),
    ):
        signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
        made = triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", capability, 32))
        assert len(made.asm["cubin"]) > 1000
print("compiled")
"""


def test_the_kernels_equal_torchs_operations_in_value_and_every_gradient() -> None:
    assert printed(VALUES, TRITON_INTERPRET="1") == "equal"


def test_the_kernels_compile_for_gpus() -> None:
    assert printed(COMPILES) == "compiled"

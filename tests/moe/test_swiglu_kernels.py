"""The Triton kernels of SwiGLU, in Triton's interpreter on the CPU and compiled for a GPU that is not there."""

import importlib.util
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no triton: make test-triton")

# In processes of their own: Triton chooses the interpreter when it is imported.
VALUES = """
import torch
from gpt4moe.moe import swiglu_kernels
from gpt4moe.moe.swiglu import FusedSwiGlu, WeightedSwiGlu

swiglu_kernels.COLUMNS = 16  # a row is then several blocks, the last one not full
for dtype, rows, width in ((torch.bfloat16, 5, 40), (torch.float32, 3, 24), (torch.float32, 0, 24)):
    hidden, weight = 3 * torch.randn(rows, 2 * width), torch.rand(rows, 1)
    grad = torch.randn(rows, width).to(dtype)
    results = []
    for function in (FusedSwiGlu, WeightedSwiGlu):
        leaves = [hidden.to(dtype).requires_grad_(), weight.clone().requires_grad_()]
        out = function.apply(*leaves)
        out.backward(grad)
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for ours, plain in zip(*results, strict=True):
        assert ours.dtype is plain.dtype and ours.shape == plain.shape
        # One exp and one rounding of bf16 may fall to the neighbour; sums of `width` terms have another order.
        tolerance = 2**-7 if ours.dtype is torch.bfloat16 else 2e-6
        torch.testing.assert_close(ours, plain, rtol=tolerance, atol=tolerance)
print("equal")
"""
COMPILES = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from gpt4moe.moe import swiglu_kernels as ours

for capability in (80, 90):
    for kernel, pointers in (
        (ours._forward, {"hidden": "*bf16", "weight": "*fp32", "out": "*bf16"}),
        (ours._backward, {"grad": "*bf16", "hidden": "*bf16", "weight": "*fp32", "grad_hidden": "*bf16",
                          "grad_weight": "*fp32"}),
    ):
        source = ASTSource(kernel, {**pointers, "width": "i32", "COLUMNS": "constexpr"}, {"COLUMNS": ours.COLUMNS})
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        assert len(made.asm["cubin"]) > 1000
print("compiled")
"""


def printed(code: str, **environment: str) -> str:
    given = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", **environment}
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=given, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()[-1]


def test_the_kernels_equal_torchs_operations_in_value_and_every_gradient() -> None:
    assert printed(VALUES, TRITON_INTERPRET="1") == "equal"


def test_the_kernels_compile_for_gpus() -> None:
    assert printed(COMPILES) == "compiled"

"""The Triton kernel of experts' weight gradients, in Triton's interpreter on the CPU and compiled for GPUs."""

import importlib.util

import pytest

from tests.moe.test_swiglu_kernels import printed

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no triton: make test-triton")

VALUES = """
import torch
from gpt4moe.moe.weight_gradient_kernels import Tile, add
from gpt4moe.moe.weight_gradients import add_product

tile = Tile(16, 32, 16, stages=1, warps=4)  # several tiles and several reads each, the last ones not full
# The interpreter of triton 3.9 multiplies the bits of bf16, not the numbers: fp16 stands for it.
for dtype in (torch.float32, torch.float16):
    for counts, height, width in (
        ([5, 0, 40, 16], 40, 72), ([0, 0], 16, 32), ([33], 200, 8), ([0, 3, 0], 8, 40), ([7, 1], 152, 40),
    ):
        rows = sum(counts)
        # Rows after the last expert's belong to nobody: padding.
        grad, x = (torch.randn(rows + 3, size).to(dtype) for size in (height, width))
        grad[rows:], x[rows:] = torch.nan, torch.nan
        ends = torch.tensor(counts).cumsum(0).to(torch.int32)
        before = torch.randn(len(counts), height, width)
        got, start = before.clone(), 0
        add(got, grad, x, ends, tile)
        for expert, count in enumerate(counts):
            part = slice(start, start + count)
            want = before[expert].double() + grad[part].double().t() @ x[part].double()
            torch.testing.assert_close(got[expert].double(), want, rtol=1e-5, atol=2e-5)
            if not count:
                assert torch.equal(got[expert], before[expert])
            start += count
print("equal")
"""
COMPILES = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from gpt4moe.moe import weight_gradient_kernels as ours

types = {"into": "*fp32", "grad": "*bf16", "x": "*bf16", "ends": "*i32", "height": "i32", "width": "i32"}
for capability, tile in ((80, ours.SMALL), (90, ours.TILES[9])):
    constants = {"ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth, "BAND": ours.BAND}
    signature = {name: types.get(name, "constexpr") for name in ours._add.arg_names}
    # Pointers and sizes that 16 divides, as Triton finds them at a launch: else it reads single elements.
    aligned = {(at,): [["tt.divisibility", 16]] for at in range(len(types))}
    source = ASTSource(ours._add, signature, constants, aligned)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert len(made.asm["cubin"]) > 1000
    shared = made.metadata.shared
    assert shared <= {80: 99, 90: 227}[capability] * 1024, shared  # of an L40S and of an H100, for one program
    units = {80: "mma.sync", 90: "wgmma"}[capability]
    assert units in made.asm["ptx"], units
print("compiled")
"""


def test_the_kernel_adds_each_experts_product_to_what_is_there() -> None:
    assert printed(VALUES, TRITON_INTERPRET="1") == "equal"


def test_the_kernel_compiles_for_gpus_and_uses_their_matrix_units() -> None:
    assert printed(COMPILES) == "compiled"

"""DeepSpeed's Triton kernels, in Triton's interpreter on the CPU, equal its torch path to the bit."""

import importlib.util
import os
import subprocess
import sys

import pytest

# In a process of its own: DeepSpeed asks for a driver when it is imported, and the interpreter is chosen by then too.
CODE = """
import torch, triton, triton.language as tl
import deepspeed.ops.triton_ops._triton as ours
ours._TRITON_AVAILABLE, ours.triton, ours.tl = True, triton, tl
import deepspeed.moe.ep_kernels as kernels

counts = torch.tensor([3, 0, 5, 9, 2, 0, 0, 7], dtype=torch.int32)  # 2 sources x 4 experts
rows, experts, sources = int(counts.sum()), 4, 2
length = (rows + experts * 8 + 7) // 8 * 8
asked = (counts, experts, sources, length, 8)
by_triton, by_torch = kernels.generate_permute_indices(*asked), kernels.generate_permute_indices(*asked, use_cpu=True)
assert torch.equal(by_triton[0], by_torch[0]) and torch.equal(by_triton[1], by_torch[1]), "indices"

x = torch.randn(rows, 64)
gathered = kernels.gather_rows(x, by_triton[0])
assert torch.equal(gathered, torch.vstack((x, x.new_zeros(64)))[by_torch[0].long()]), "rows"
assert torch.equal(gathered[kernels.inverse_permutation(by_triton[0], rows)], x), "inverse"

x.requires_grad_()
kernels.permute_rows_supported = lambda rows: True
import deepspeed.module_inject.auto_ep_layer as layer
y, indices, _, _ = layer.permute_by_local_expert(x, counts.view(sources, experts))
z = layer.unpermute_by_local_expert(y * 2, indices, rows)
z.sum().backward()
assert torch.equal(z, 2 * x) and torch.equal(x.grad, torch.full_like(x, 2.0)), "round trip"
print("equal")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no triton: make test-triton")
def test_triton_kernels_equal_the_torch_path() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-W", "ignore", "-c", CODE]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "equal", done.stderr[-2000:]

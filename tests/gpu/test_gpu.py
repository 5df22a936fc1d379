"""On one GPU: the layer and a training step are what they are on the CPU.

Each test runs once with every GPU hidden and once with one, in a process of its own: a process keeps what it found.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gpt4moe.config.kernels import ExpertKernel

ROOT = Path(__file__).resolve().parents[2]


def _environment(device: str) -> dict[str, str]:
    """With every GPU hidden ("cpu"), or with those that the person who runs the tests has left visible ("cuda")."""
    variables, visible = dict(os.environ), os.environ["GPT4MOE_TEST_GPUS"]  # tests/conftest.py sets it
    del variables["CUDA_VISIBLE_DEVICES"]
    if device == "cpu" or visible != "all":
        variables["CUDA_VISIBLE_DEVICES"] = "" if device == "cpu" else visible
    return variables


@pytest.fixture(scope="module", autouse=True)
def gpu() -> None:
    """Skips where torch sees no GPU."""
    look = [sys.executable, "-c", "import sys, torch; sys.exit(not torch.cuda.is_available())"]
    if torch.version.cuda is None or subprocess.run(look, env=_environment("cuda"), check=False).returncode:
        pytest.skip("no GPU")


pytestmark = pytest.mark.gpu


def _on(device: str, *arguments: str) -> dict[str, list[float]]:
    """What tests/gpu/one_process.py prints on "cpu" or "cuda"."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.gpu.one_process", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=_environment(device), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer.pop("device") == device
    return answer


def _distance(got: list[float], wanted: list[float]) -> float:
    one, other = torch.tensor(got, dtype=torch.float64), torch.tensor(wanted, dtype=torch.float64)
    return float((one - other).norm() / other.norm())


def test_the_layer_in_fp32_equals_the_cpus_in_value_and_gradient() -> None:
    layer = ("layer", "fp32", ExpertKernel.per_expert.value)
    got, wanted = _on("cuda", *layer), _on("cpu", *layer)
    for name, values in wanted.items():
        assert _distance(got[name], values) < 1e-5, name  # fp32 products without TF32, in another order


def test_grouped_mm_equals_per_expert_in_bf16() -> None:
    got, wanted = (
        _on("cuda", "layer", "bf16", kernel.value) for kernel in (ExpertKernel.grouped_mm, ExpertKernel.per_expert)
    )
    for name, values in wanted.items():
        assert _distance(got[name], values) < 2**-7, name  # a unit in the last place of bf16, relative


def test_training_steps_in_fp32_equal_the_cpus() -> None:
    got, wanted = _on("cuda", "steps", "fp32", "auto"), _on("cpu", "steps", "fp32", "auto")
    for name in ("losses", "norms", "saved"):
        assert got[name] == pytest.approx(wanted[name], rel=1e-4), name  # as far as layouts may drift in a few steps


def test_training_steps_in_bf16_are_finite_and_near_fp32() -> None:
    got, wanted = _on("cuda", "steps", "bf16", "auto"), _on("cpu", "steps", "fp32", "auto")
    assert got["losses"] == pytest.approx(wanted["losses"], rel=2e-2)
    assert all(0 < norm < float("inf") for norm in got["norms"])


def test_attention_inside_documents_equals_the_cpus() -> None:
    """In bf16 by one call of flash attention, in fp32 by a call for each document."""
    wanted = _on("cpu", "documents", "fp32", "auto")
    for dtype, most in (("fp32", 1e-5), ("bf16", 2e-2)):
        got = _on("cuda", "documents", dtype, "auto")
        for name, values in wanted.items():
            assert _distance(got[name], values) < most, (dtype, name)

"""A kernel that a device, a dtype or a size cannot have is refused before the model is built, with what can."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gpt4moe.architecture.names import EXPERTS_DOWN, layer_name
from gpt4moe.config.kernels import ExpertKernel, SwiGluKernel, expert_kernel, swiglu_kernel
from gpt4moe.config.load import load_run_config
from gpt4moe.config.run import RunConfig
from gpt4moe.errors import ConfigError, LayoutError
from gpt4moe.model import gpt
from gpt4moe.parallel import kernel_problems as subject
from gpt4moe.parallel.environment import Environment
from gpt4moe.parallel.kernel_problems import (
    DeviceKind,
    has_grouped_product,
    is_installed,
    kernel_problems,
    missing_packages,
)
from gpt4moe.planner.estimate import estimate
from gpt4moe.training import launch

CPU, GPU, OLD = DeviceKind(is_gpu=False), DeviceKind(is_gpu=True), DeviceKind(is_gpu=True, capability=(7, 5))
TE, APEX, GROUPED = "kernels.attention=transformer_engine", "kernels.norm=apex", "kernels.experts=grouped_mm"
FUSED = "kernels.swiglu=triton"
ROTARY, LOSS = "kernels.rotary=triton", "kernels.cross_entropy=triton"
NO_TRITON = ("kernels.rotary=torch", "kernels.cross_entropy=torch", "kernels.router=torch")
ROUTER = "kernels.router=triton"
GRADIENTS = "kernels.weight_gradients=fused"
DOCUMENTS = "data.document_mask=true"
BF16, WIDE, ODD = "precision=bf16", "model.head_dim=320", "model.moe.ffn_hidden_size=100"


def run_of(*overrides: str) -> RunConfig:
    return load_run_config(["+experiment=tiny", "run.name=test", "data=mock", *overrides])


@pytest.mark.parametrize(
    ("overrides", "device", "cause", "cure"),
    [
        # sizes of the grouped product, where it is known to be the kernel
        ((GROUPED, BF16, ODD), None, r"ffn_hidden_size=100 is no multiple of 8", "per_expert"),
        ((GROUPED, BF16, ODD), CPU, r"ffn_hidden_size=100 is no multiple of 8", "per_expert"),
        ((BF16, ODD), GPU, r"ffn_hidden_size=100 is no multiple of 8", "per_expert"),
        ((BF16, "model.moe.ffn_hidden_size=48", "parallel.etp=4"), GPU, r"48 / parallel.etp=4", "per_expert"),
        ((BF16, "stage.lora.rank=4"), GPU, r"stage.lora.rank=4 is no multiple of 8", "per_expert"),
        ((BF16, ODD), None, None, None),  # auto on a device that nobody knows yet
        ((BF16, ODD), CPU, None, None),
        ((ODD,), GPU, None, None),  # fp32 has per_expert
        ((BF16, ODD, "kernels.experts=per_expert"), GPU, None, None),
        ((BF16, "model.moe=null", "model.ffn_hidden_size=100"), GPU, None, None),
        # NVIDIA's kernels
        ((TE,), CPU, r"transformer_engine runs on GPUs only", "attention=sdpa"),
        ((APEX,), CPU, r"norm=apex runs on GPUs only", "norm=torch"),
        ((TE, APEX, BF16), GPU, None, None),
        # the SwiGLU of grouped_mm
        ((FUSED, BF16), CPU, r"swiglu=triton runs on GPUs only", "swiglu=auto"),
        ((FUSED, BF16), GPU, None, None),
        ((FUSED,), GPU, r"swiglu=triton with kernels.experts=auto, which in fp32 is one product", "swiglu=auto"),
        ((FUSED, BF16, "kernels.experts=per_expert"), GPU, r"kernels.experts=per_expert, which", "experts=grouped_mm"),
        ((FUSED, BF16), None, None, None),
        ((FUSED,), None, r"swiglu=triton with kernels.experts=auto, which in fp32 is one product", "swiglu=auto"),
        ((FUSED, BF16, "kernels.experts=per_expert"), None, r"kernels.experts=per_expert, which", "experts=grouped_mm"),
        ((FUSED, "model.moe=null", "model.ffn_hidden_size=96"), None, None, None),
        # the rotary embedding and the loss, which take every dtype and size
        ((ROTARY,), CPU, r"rotary=triton runs on GPUs only", "rotary=auto"),
        ((LOSS, BF16), CPU, r"cross_entropy=triton runs on GPUs only", "cross_entropy=auto"),
        ((ROTARY, LOSS), GPU, None, None),
        ((ROTARY, LOSS), None, None, None),
        # gradients of weights, which any device and dtype can add, but not any engine
        ((GRADIENTS,), CPU, None, None),
        ((GRADIENTS, BF16), GPU, None, None),
        ((ROUTER,), CPU, r"router=triton runs on GPUs only", "router=auto"),
        ((ROUTER,), GPU, None, None),
        ((ROUTER, "model.moe=null", "model.ffn_hidden_size=96"), GPU, None, None),
        ((ROUTER, "router@model.moe.router=sigmoid_bias"), None, r"kind=sigmoid_bias", "router=auto"),
        ((ROUTER, "model.moe.router.load_balancing_scope=sequence"), GPU, r"scope=sequence", "router=auto"),
        ((GRADIENTS, "engine=deepspeed"), CPU, r"fused with engine.kind=deepspeed", "weight_gradients=auto"),
        ((GRADIENTS, "engine=deepspeed"), None, r"fused with engine.kind=deepspeed", "engine=megatron"),
        (("engine=deepspeed",), GPU, None, None),
        ((TE, "parallel.cp=2"), GPU, r"parallel.cp=2 and precision.dtype=fp32", "precision=bf16"),
        ((TE, "parallel.cp=2", BF16), GPU, None, None),
        ((TE, BF16, DOCUMENTS), GPU, None, None),
        ((TE, DOCUMENTS), GPU, r"document_mask=true and precision.dtype=fp32", "precision=bf16"),
        ((TE, BF16, DOCUMENTS, "parallel.cp=2"), None, r"cp=2 and data.document_mask=true", "attention=sdpa"),
        ((BF16, DOCUMENTS, "parallel.cp=2"), GPU, None, None),
        # bf16
        ((BF16,), OLD, r"bf16 on a GPU of compute capability 7\.5", "precision=fp32"),
        ((), OLD, None, None),
        ((BF16,), CPU, None, None),
        # wide heads
        ((BF16, WIDE), GPU, r"Heads of 320 .* 256 at most, and with num_query", "groups=null"),
        ((BF16, WIDE, "model.num_query_groups=null"), GPU, None, None),
        ((BF16, WIDE, TE), GPU, None, None),
        ((BF16, WIDE), CPU, None, None),
        ((BF16, "model.head_dim=256"), GPU, None, None),
    ],
)  # fmt: skip
def test_what_a_device_cannot_take_is_named_with_what_can(
    overrides: tuple[str, ...], device: DeviceKind | None, cause: str | None, cure: str | None
) -> None:
    problems = kernel_problems(run_of(*overrides), device)
    assert len(problems) == (cause is not None)
    for problem in problems:
        assert cause and re.search(cause, problem.cause) and cure and cure in problem.cure
        assert "\n" not in problem.cause + problem.cure


@pytest.mark.parametrize(
    ("overrides", "device", "installed", "package"),
    [
        ((TE,), None, (), "transformer_engine"),
        ((TE,), None, ("transformer_engine",), None),
        ((APEX,), None, (), "apex"),
        ((APEX,), GPU, ("apex", "triton"), None),
        ((BF16,), GPU, (), "triton"),
        ((BF16,), GPU, ("triton",), None),
        ((BF16,), CPU, (), None),
        ((BF16,), None, (), None),
        ((BF16, FUSED), None, (), "triton"),
        ((BF16, FUSED), None, ("triton",), None),
        ((FUSED, "model.moe=null", "model.ffn_hidden_size=96"), None, (), None),
        ((BF16, "kernels.experts=per_expert", *NO_TRITON), GPU, (), None),
        ((BF16, "kernels.swiglu=torch", *NO_TRITON), GPU, (), "weight_gradients=auto on a GPU is a Triton kernel"),
        ((BF16, "kernels.swiglu=torch", "kernels.weight_gradients=torch", *NO_TRITON), GPU, (), None),
        ((BF16, "kernels.swiglu=torch", "engine=deepspeed", *NO_TRITON), GPU, (), None),
        ((BF16, "kernels.swiglu=torch", "stage.lora.rank=2", *NO_TRITON), GPU, (), None),
        ((BF16, "kernels.swiglu=torch", "stage.train=['*norm*']", *NO_TRITON), GPU, (), None),
        ((BF16, "kernels.swiglu=torch", f"stage.train=[{layer_name(1, EXPERTS_DOWN)}]", *NO_TRITON), GPU, (), "triton"),
        ((BF16, "kernels.swiglu=torch", "parallel.ep=16", *NO_TRITON), GPU, (), None),
        ((GRADIENTS, BF16), CPU, (), None),
        ((GRADIENTS, BF16, "kernels.experts=grouped_mm"), None, (), None),
        (NO_TRITON, GPU, (), None),
        ((), GPU, (), "kernels.cross_entropy=auto and kernels.router=auto on a GPU are Triton kernels, and triton"),
        ((*NO_TRITON[:2],), GPU, (), "kernels.router=auto on a GPU is a Triton kernel, and triton"),
        ((*NO_TRITON[:2], "router@model.moe.router=sigmoid_bias"), GPU, (), None),
        ((ROTARY,), None, (), "kernels.rotary=triton on a GPU is a Triton kernel, and triton"),
        ((), None, (), None),
    ],
)
def test_a_missing_package_is_named_before_anything_is_built(
    overrides: tuple[str, ...], device: DeviceKind | None, installed: tuple[str, ...], package: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(subject, "is_installed", lambda name, folder="": name in installed)
    monkeypatch.setattr(subject, "missing_build_tool", lambda: None)
    problems = missing_packages(run_of(*overrides), device)
    assert len(problems) == (package is not None)
    assert all(package in problem.cause and " or set kernels." in problem.cure for problem in problems if package)


def test_what_triton_compiles_with_is_asked_for_where_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "is_installed", lambda name, folder="": True)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(subject, "which", lambda name: None)
    (problem,) = missing_packages(run_of(), GPU)
    assert "a C compiler is missing" in problem.cause and "gcc" in problem.cure and "rotary=torch" in problem.cure
    assert missing_packages(run_of(), CPU) == missing_packages(run_of(ROTARY), None) == []
    assert missing_packages(run_of(*NO_TRITON), GPU) == []
    monkeypatch.setattr(subject, "which", lambda name: "/usr/bin/clang" if name == "clang" else None)
    monkeypatch.setattr(subject.sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
    (problem,) = missing_packages(run_of(), GPU)
    assert f"{tmp_path / 'Python.h'} is missing" in problem.cause
    (tmp_path / "Python.h").touch()
    assert missing_packages(run_of(), GPU) == []


def test_a_package_of_the_same_name_is_another_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert is_installed("apex") and not is_installed("apex", "normalization")
    (tmp_path / "apex" / "normalization").mkdir()
    assert is_installed("apex", "normalization") and not is_installed("no_such_package")


def test_the_grouped_product_is_refused_in_fp32() -> None:
    with pytest.raises(ConfigError, match=r"grouped_mm with precision.dtype=fp32") as refused:
        run_of(GROUPED)
    assert refused.value.exit_code == 2 and "precision=bf16" in refused.value.cure


def test_auto_is_the_grouped_product_in_bf16_on_gpus_alone() -> None:
    bf16, fp32 = run_of(BF16).precision.dtype, run_of().precision.dtype
    chosen = {
        (on_gpu, dtype): expert_kernel(ExpertKernel.auto, on_gpu=on_gpu, dtype=dtype)
        for on_gpu in (False, True)
        for dtype in (bf16, fp32)
    }
    assert [place for place, kernel in chosen.items() if kernel is ExpertKernel.grouped_mm] == [(True, bf16)]


def test_auto_is_the_fused_swiglu_for_grouped_products_on_gpus_alone() -> None:
    chosen = {
        (on_gpu, experts): swiglu_kernel(SwiGluKernel.auto, on_gpu=on_gpu, experts=experts)
        for on_gpu in (False, True)
        for experts in (ExpertKernel.per_expert, ExpertKernel.grouped_mm)
    }
    fused = [place for place, kernel in chosen.items() if kernel is SwiGluKernel.triton]
    assert fused == [(True, ExpertKernel.grouped_mm)]


def test_a_launch_refuses_without_torch_what_no_device_takes() -> None:
    environment = Environment(rank=0, world_size=1, local_rank=0, master=None, source="one process")
    for overrides, cause in (
        ((GROUPED, BF16, ODD), "no multiple of 8"),
        ((TE,), "Transformer Engine is not installed"),
        ((FUSED,), "is one product for each expert"),
    ):
        with pytest.raises(LayoutError, match=cause) as refused:
            launch.check(run_of(*overrides), environment)
        assert refused.value.exit_code == 2


def test_training_ends_with_status_2_and_two_lines(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom gpt4moe.train import main\nstatus = main(sys.argv[1:])\n"
        "assert 'torch' not in sys.modules\nsys.exit(status)"
    )
    given = ["+experiment=tiny", "data=mock", "run.name=x", f"run.root={tmp_path}", APEX]
    done = subprocess.run([sys.executable, "-c", code, *given], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and [line[:4] for line in done.stderr.splitlines()] == ["erro", "fix:"], done.stderr
    assert "apex is not installed" in done.stderr and list(tmp_path.iterdir()) == []


def test_a_model_is_refused_on_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    for overrides, device, cause in (((BF16,), "cuda", "compute capability 7.0"), ((APEX,), "cpu", "GPUs only")):
        with pytest.raises(LayoutError, match=cause):
            gpt._require_kernels(run_of(*overrides), torch.device(device))
    gpt._require_kernels(run_of(BF16), torch.device("cpu"))


def test_a_plan_names_kernels_that_the_cluster_does_not_take() -> None:
    from gpt4moe.config.load import load_plan_config

    overrides = ["+experiment=tiny", "data=mock", BF16, ODD]
    on_gpus = estimate(load_plan_config([*overrides, "cluster=h100_80g"]))
    assert any("ffn_hidden_size=100 is no multiple of 8" in warning for warning in on_gpus.warnings)
    on_cpus = estimate(load_plan_config([*overrides, "cluster=cpu"]))
    assert not any("no multiple of 8" in warning for warning in on_cpus.warnings)


@pytest.mark.parametrize(
    ("cluster", "is_one_kernel"), [("a100_80g", False), ("l40s", False), ("h200_141g", True), ("gb300", True)]
)
def test_the_grouped_product_is_one_kernel_from_hopper_on(cluster: str, is_one_kernel: bool) -> None:
    capability = DeviceKind.of_cluster(run_of(f"cluster={cluster}").cluster).capability
    assert has_grouped_product(capability) is is_one_kernel

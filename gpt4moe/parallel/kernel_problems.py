"""Whether the kernels that a run chooses take its device, its dtype and its sizes. No torch.

    a launch, before torch is imported       device None: what no device takes, and what is not installed
    planner, preflight, GPU rehearsal        the device of run.cluster
    build_model                              the device that the rank has

Keys that choose kernels: kernels.*, precision.dtype. Engines and optimizers run on every device.
"""

import os
import sysconfig
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path
from shutil import which

from gpt4moe.config.cluster import ClusterConfig, Generation
from gpt4moe.config.kernels import (
    AttentionKernel,
    ExpertKernel,
    FusedKernel,
    NormKernel,
    SwiGluKernel,
    WeightGradients,
    expert_kernel,
    swiglu_kernel,
)
from gpt4moe.config.optimizer import Dtype, EngineKind
from gpt4moe.config.run import RunConfig
from gpt4moe.parallel.legality import Problem, grouped_product_problems

FIRST_BF16 = (8, 0)
"""Compute capability of Ampere, the first GPUs with bf16 matrix units; flash attention and grouped_mm want it too."""
WIDEST_FLASH_HEAD = 256
CAPABILITIES = {
    Generation.ampere: (8, 0),
    Generation.ada: (8, 9),
    Generation.hopper: (9, 0),
    Generation.blackwell: (10, 0),
    Generation.blackwell_ultra: (10, 3),
}
"""Compute capability of NVIDIA's generations."""
FUSED = ("rotary", "cross_entropy")
"""Keys of `kernels` whose Triton kernels take every dtype and size."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceKind:
    """What kernels ask of a device."""

    is_gpu: bool
    capability: tuple[int, int] = FIRST_BF16
    """Compute capability of a GPU."""

    @classmethod
    def of_cluster(cls, cluster: ClusterConfig) -> "DeviceKind":
        """Every generation of configs/cluster has bf16."""
        is_gpu = cluster.generation is not Generation.cpu
        return cls(is_gpu=is_gpu, capability=CAPABILITIES.get(cluster.generation, FIRST_BF16))


def has_grouped_product(capability: tuple[int, int]) -> bool:
    """Whether torch's grouped_mm is one kernel in bf16. On other GPUs it copies the ends of the groups to the host
    and multiplies one group after the other (torch 2.10 to 2.13, ATen/native/GroupedMMUtils.h)."""
    return capability[0] in (9, 10)


def kernel_problems(run: RunConfig, device: DeviceKind | None) -> list[Problem]:
    """Kernels that the run chooses and that refuse it, or that would run out of memory at its sizes.

    Args:
        device: None: not known yet.
    """
    problems = _weight_gradient_problems(run)
    if _expert_kernel(run, device) is ExpertKernel.grouped_mm:
        problems += grouped_product_problems(run.model, run.parallel)
    if device is None or device.is_gpu:
        problems += _swiglu_problems(run) + _router_problems(run)
    if device is not None:
        problems += _gpu_problems(run, device) if device.is_gpu else _cpu_problems(run)
    if run.kernels.attention is AttentionKernel.transformer_engine:
        problems += _transformer_engine_problems(run)
    return problems


def _weight_gradient_problems(run: RunConfig) -> list[Problem]:
    if run.kernels.weight_gradients is not WeightGradients.fused or run.engine.kind is EngineKind.megatron:
        return []
    return [
        Problem(
            f"kernels.weight_gradients=fused with engine.kind={run.engine.kind.value}: it adds gradients to the fp32 "
            "buffers of Megatron's DDP, which this engine does not have.",
            "Set engine=megatron, or kernels.weight_gradients=auto.",
        )
    ]


def _transformer_engine_problems(run: RunConfig) -> list[Problem]:
    problems, cp, is_fp32 = [], run.parallel.cp, run.precision.dtype is Dtype.fp32
    if is_fp32 and (cp > 1 or run.attends_by_document):
        what = f"parallel.cp={cp}" if cp > 1 else _documents_of(run)
        kernels = "context parallelism" if cp > 1 else "several documents in a sequence"
        problems.append(
            Problem(
                f"kernels.attention=transformer_engine with {what} and precision.dtype=fp32: its kernels for {kernels} "
                "take bf16 only.",
                "Set precision=bf16, or kernels.attention=sdpa.",
            )
        )
    if cp > 1 and run.attends_by_document:
        problems.append(
            Problem(
                f"kernels.attention=transformer_engine with parallel.cp={cp} and {_documents_of(run)}: it would cut "
                "each document over the ranks, and a rank here holds two pieces of the whole sequence.",
                "Set kernels.attention=sdpa (flash attention in bf16), parallel.cp=1, or "
                f"{_documents_of(run).replace('true', 'false')}.",
            )
        )
    return problems


def _documents_of(run: RunConfig) -> str:
    """The setting by which samples have documents."""
    return "data.document_mask=true" if run.data.document_mask else "data.pack=true"


def missing_packages(run: RunConfig, device: DeviceKind | None) -> list[Problem]:
    """Packages that the chosen kernels need and this Python does not have. Imports none of them."""
    kernels, problems = run.kernels, []
    if kernels.attention is AttentionKernel.transformer_engine and not is_installed("transformer_engine"):
        problems.append(
            Problem(
                "kernels.attention=transformer_engine, but Transformer Engine is not installed.",
                "Install it as requirements.txt says, or set kernels.attention=sdpa.",
            )
        )
    if kernels.norm is NormKernel.apex and not is_installed("apex", "normalization"):
        problems.append(
            Problem(
                "kernels.norm=apex, but NVIDIA apex is not installed (the package of that name on PyPI is another).",
                "Build it as requirements.txt says, or set kernels.norm=torch.",
            )
        )
    return problems + _triton_problems(run, device)


def _triton_problems(run: RunConfig, device: DeviceKind | None) -> list[Problem]:
    chosen = triton_keys(run, device)
    if not chosen:
        return []
    settings = " and ".join(f"kernels.{key}={getattr(run.kernels, key).value}" for key in chosen)
    are = "is a Triton kernel" if len(chosen) == 1 else "are Triton kernels"
    lack, cure = "triton is not installed", "Install the triton that belongs to this torch (a CUDA build brings it)"
    if is_installed("triton"):
        if device is None or (missing := missing_build_tool()) is None:
            return []
        lack = f"triton compiles a part of itself at the first one, for which {missing} is missing"
        cure = "Install both on this node (apt-get install gcc python3-dev)"
    return [
        Problem(
            f"{settings} on a GPU {are}, and {lack}.",
            f"{cure}, or set {' '.join(f'kernels.{key}=torch' for key in chosen)}.",
        )
    ]


def missing_build_tool() -> str | None:
    """Of what triton's runtime/build.py takes on the node of a GPU (3.9); None: all is there."""
    if not (os.environ.get("CC") or which("gcc") or which("clang")):
        return "a C compiler"
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    header = Path(sysconfig.get_paths(scheme)["include"]) / "Python.h"
    return None if header.is_file() else str(header)


def triton_keys(run: RunConfig, device: DeviceKind | None) -> list[str]:
    """Keys of `kernels` by which a run has Triton kernels on a device; on an unknown one, those that ask for them."""
    kernels, on_gpu = run.kernels, device is not None and device.is_gpu
    if device is not None and not on_gpu:
        return []
    swiglu = _swiglu_on_gpus(run) is SwiGluKernel.triton and (on_gpu or kernels.swiglu is SwiGluKernel.triton)
    fused = [key for key in FUSED if getattr(kernels, key).is_triton(on_gpu=on_gpu)]
    has_router = run.model.moe is not None and run.model.moe.router.is_fusable
    fused += ["router"] * (has_router and kernels.router.is_triton(on_gpu=on_gpu))
    return ["swiglu"] * swiglu + fused + ["weight_gradients"] * (on_gpu and _has_grouped_gradients(run))


def _has_grouped_gradients(run: RunConfig) -> bool:
    """Whether a GPU may add the gradients of several experts by one Triton kernel. All others are torch's products."""
    moe, kernels = run.model.moe, run.kernels
    if moe is None or moe.num_experts == run.parallel.ep or not _trains_experts(run):
        return False
    is_fused = kernels.weight_gradients.is_fused(on_gpu=True, engine=run.engine.kind)
    kernel = expert_kernel(kernels.experts, on_gpu=True, dtype=run.precision.dtype)
    return is_fused and kernel is ExpertKernel.grouped_mm


def _trains_experts(run: RunConfig) -> bool:
    """Whether the run trains a matrix of routed experts, not adapters alone (as architecture.trained says)."""
    if run.stage.lora.rank or not run.stage.train:
        return not run.stage.lora.rank
    names = (
        f"decoder.layers.{layer}.mlp.experts.{matrix}"
        for layer, has_experts in enumerate(run.model.moe_layers)
        if has_experts
        for matrix in ("gate_up", "down")
    )
    return any(fnmatchcase(name, pattern) for name in names for pattern in run.stage.train)


def is_installed(package: str, folder: str = "") -> bool:
    """Whether there is a package, with this folder in it; it is not imported."""
    found = find_spec(package)
    places = (found.submodule_search_locations or ()) if found else ()
    return any((Path(place) / folder).is_dir() for place in places)


def _expert_kernel(run: RunConfig, device: DeviceKind | None) -> ExpertKernel | None:
    """None: no experts, or it depends on a device that is not known yet."""
    wish = run.kernels.experts
    if run.model.moe is None or (device is None and wish is ExpertKernel.auto):
        return None
    return expert_kernel(wish, on_gpu=device is not None and device.is_gpu, dtype=run.precision.dtype)


def _swiglu_on_gpus(run: RunConfig) -> SwiGluKernel | None:
    """None: no experts."""
    if run.model.moe is None:
        return None
    experts = expert_kernel(run.kernels.experts, on_gpu=True, dtype=run.precision.dtype)
    return swiglu_kernel(run.kernels.swiglu, on_gpu=True, experts=experts)


def _swiglu_problems(run: RunConfig) -> list[Problem]:
    """The Triton kernel without the grouped product of GPUs; no other device has the kernel."""
    experts = expert_kernel(run.kernels.experts, on_gpu=True, dtype=run.precision.dtype)
    if experts is ExpertKernel.grouped_mm or run.kernels.swiglu is not SwiGluKernel.triton or run.model.moe is None:
        return []
    return [
        Problem(
            f"kernels.swiglu=triton with kernels.experts={run.kernels.experts.value}, which in "
            f"{run.precision.dtype.value} is one product for each expert: the kernel is for all of them at once.",
            "Set precision=bf16 and kernels.experts=grouped_mm, or kernels.swiglu=auto.",
        )
    ]


def _router_problems(run: RunConfig) -> list[Problem]:
    moe = run.model.moe
    if run.kernels.router is not FusedKernel.triton or moe is None or moe.router.is_fusable:
        return []
    kind, scope = moe.router.kind.value, moe.router.load_balancing_scope.value
    cause = (
        f"kernels.router=triton with model.moe.router.kind={kind} and load_balancing_scope={scope}: the kernel "
        "chooses among softmax probabilities (topk, switch), and sums over all tokens of a micro-batch."
    )
    return [Problem(cause, "Set kernels.router=auto.")]


def _cpu_problems(run: RunConfig) -> list[Problem]:
    chosen = (
        (run.kernels.attention is AttentionKernel.transformer_engine, "attention", "transformer_engine", "sdpa"),
        (run.kernels.norm is NormKernel.apex, "norm", "apex", "torch"),
        (run.kernels.swiglu is SwiGluKernel.triton, "swiglu", "triton", "auto"),
        *((getattr(run.kernels, key) is FusedKernel.triton, key, "triton", "auto") for key in (*FUSED, "router")),
    )
    return [
        Problem(f"kernels.{key}={value} runs on GPUs only, and this is a CPU.", f"Set kernels.{key}={other}.")
        for is_chosen, key, value, other in chosen
        if is_chosen
    ]


def _gpu_problems(run: RunConfig, device: DeviceKind) -> list[Problem]:
    problems, model, is_bf16 = [], run.model, run.precision.dtype is Dtype.bf16
    if is_bf16 and device.capability < FIRST_BF16:
        shown = ".".join(map(str, device.capability))
        problems.append(
            Problem(
                f"precision.dtype=bf16 on a GPU of compute capability {shown}: its matrix units, flash attention and "
                "the grouped product have bf16 from 8.0 (A100) on.",
                "Use newer GPUs, or set precision=fp32.",
            )
        )
    is_grouped = model.query_groups < model.num_attention_heads
    is_wide = model.head_size > WIDEST_FLASH_HEAD and run.kernels.attention is AttentionKernel.sdpa
    if is_bf16 and is_wide and is_grouped:
        scores = 4 * run.training.micro_batch_size * model.num_attention_heads // run.parallel.tp * model.seq_length**2
        problems.append(
            Problem(
                f"Heads of {model.head_size} (model.head_dim, or hidden_size / num_attention_heads): flash attention "
                f"takes {WIDEST_FLASH_HEAD} at most, and with num_query_groups={model.num_query_groups} below "
                f"num_attention_heads={model.num_attention_heads} torch has only the kernel that keeps the scores in "
                f"fp32: {scores / 1e9:.3g} GB a layer.",
                f"Set model.head_dim to {WIDEST_FLASH_HEAD} or less, or model.num_query_groups=null.",
            )
        )
    return problems

"""Group `kernels`: who computes what of a layer, and what `auto` is on a device. parallel.kernel_problems refuses."""

from dataclasses import dataclass
from enum import Enum

from gpt4moe.config.optimizer import Dtype, EngineKind


class AttentionKernel(str, Enum):
    """sdpa: torch's scaled_dot_product_attention (flash on GPUs). transformer_engine: NVIDIA's, when installed."""

    sdpa = "sdpa"
    transformer_engine = "transformer_engine"


class NormKernel(str, Enum):
    """torch: torch.nn.RMSNorm. apex: the fused RMSNorm of NVIDIA apex, which is built from source."""

    torch = "torch"
    apex = "apex"


class ExpertKernel(str, Enum):
    """grouped_mm: torch's grouped matrix product. per_expert: one matrix product for each expert. auto: grouped_mm in
    bf16 on GPUs, else per_expert."""

    auto = "auto"
    grouped_mm = "grouped_mm"
    per_expert = "per_expert"


def expert_kernel(wish: ExpertKernel, *, on_gpu: bool, dtype: Dtype) -> ExpertKernel:
    """What `auto` is. Any other wish is itself."""
    if wish is not ExpertKernel.auto:
        return wish
    return ExpertKernel.grouped_mm if on_gpu and dtype is Dtype.bf16 else ExpertKernel.per_expert


class SwiGluKernel(str, Enum):
    """torch: torch's operations. triton: one Triton kernel each way, for experts of grouped_mm on GPUs. auto: triton
    where it can be."""

    auto = "auto"
    torch = "torch"
    triton = "triton"


def swiglu_kernel(wish: SwiGluKernel, *, on_gpu: bool, experts: ExpertKernel) -> SwiGluKernel:
    """What `auto` is. Any other wish is itself.

    Args:
        experts: as expert_kernel decides, not auto.
    """
    if wish is not SwiGluKernel.auto:
        return wish
    return SwiGluKernel.triton if on_gpu and experts is ExpertKernel.grouped_mm else SwiGluKernel.torch


class FusedKernel(str, Enum):
    """torch: Megatron's operations of torch. triton: one Triton kernel each way, on GPUs. auto: triton on GPUs."""

    auto = "auto"
    torch = "torch"
    triton = "triton"

    def is_triton(self, *, on_gpu: bool) -> bool:
        """Whether it is our Triton kernel on such a device; a wish that the device cannot have is refused elsewhere."""
        return self is FusedKernel.triton or (self is FusedKernel.auto and on_gpu)


class WeightGradients(str, Enum):
    """torch: in the model's dtype, then added to the fp32 gradients. fused: the product adds them itself, for
    engine.kind=megatron. auto: fused on GPUs where it can be."""

    auto = "auto"
    torch = "torch"
    fused = "fused"

    def is_fused(self, *, on_gpu: bool, engine: EngineKind) -> bool:
        """Whether it is `fused` there; a wish that the engine cannot have is refused elsewhere."""
        return self is WeightGradients.fused or (
            self is WeightGradients.auto and on_gpu and engine is EngineKind.megatron
        )


@dataclass(kw_only=True, slots=True)
class KernelsConfig:
    attention: AttentionKernel = AttentionKernel.sdpa
    norm: NormKernel = NormKernel.torch
    experts: ExpertKernel = ExpertKernel.auto
    swiglu: SwiGluKernel = SwiGluKernel.auto
    rotary: FusedKernel = FusedKernel.auto
    """The rotary embedding of queries and keys, with the cut of the projection into them and values."""
    cross_entropy: FusedKernel = FusedKernel.auto
    """Of the vocabulary's logits, which tp cuts."""
    router: FusedKernel = FusedKernel.auto
    """The choice of experts and the sums of losses and statistics. auto: triton on GPUs for kinds topk and switch,
    where no loss is balanced per sequence."""
    weight_gradients: WeightGradients = WeightGradients.auto
    """Of linear layers, experts and the output layer. Tied embeddings on one stage, norms and routers are not fused."""

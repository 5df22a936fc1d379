"""The layers of a chunk as Megatron's specs: which module plays each part.

    LayerKind (attention, mlp) -> ATTENTION_SPECS, MLP_SPECS put modules into a layer's spec -> block_spec -> GPTModel

The configuration chooses kernels. Optional packages are imported where their kernel is chosen.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron.core import tensor_parallel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from gpt4moe.config.kernels import AttentionKernel, NormKernel
from gpt4moe.config.model import AttentionKind, LayerKind, MlpKind
from gpt4moe.config.parallel import Recompute
from gpt4moe.config.run import RunConfig
from gpt4moe.model.attention import SdpaAttention
from gpt4moe.model.documents import by_transformer_engine
from gpt4moe.model.gated_attention import GatedCrossAttention, VisionLayer
from gpt4moe.model.linear import ColumnLinear, RowLinear
from gpt4moe.model.rotary import FusedRotaryAttention
from gpt4moe.moe.layer import ExpertParallelMLP
from gpt4moe.parallel.groups import ProcessGroups


def _transformer_engine_attention() -> Any:
    module = importlib.import_module("megatron.core.extensions.transformer_engine")
    return by_transformer_engine(module.TEDotProductAttention)


def _apex_norm() -> type[nn.Module]:
    return importlib.import_module("apex.normalization").FusedRMSNorm


CORE_ATTENTION: dict[AttentionKernel, Callable[[], Any]] = {
    AttentionKernel.sdpa: lambda: SdpaAttention,
    AttentionKernel.transformer_engine: _transformer_engine_attention,
}
NORMS: dict[NormKernel, Callable[[], type[nn.Module]]] = {
    NormKernel.torch: lambda: nn.RMSNorm,
    NormKernel.apex: _apex_norm,
}


def norm_class(kernel: NormKernel) -> type[nn.Module]:
    """An RMSNorm with the constructor that Megatron calls. Its own local one refuses sequence parallelism."""

    class Norm(NORMS[kernel]()):  # type: ignore[misc]
        def __init__(self, *, config: Any, hidden_size: int, eps: float, **_: Any):
            super().__init__(hidden_size, eps=eps)
            self.to(config.params_dtype)

    return Norm


@dataclass(frozen=True, kw_only=True, slots=True)
class BuiltWith:
    """What the parts of a layer are built with."""

    run: RunConfig
    groups: ProcessGroups
    norm: type[nn.Module]


def _grouped_query(layer: ModuleSpec, built: BuiltWith) -> None:
    attention = layer.submodules.self_attention
    if built.run.kernels.rotary.is_triton(on_gpu=built.groups.device.type == "cuda"):
        attention.module = FusedRotaryAttention
    parts = attention.submodules
    parts.linear_qkv, parts.linear_proj = ColumnLinear, RowLinear
    parts.core_attention = CORE_ATTENTION[built.run.kernels.attention]()
    if built.run.model.qk_norm:
        parts.q_layernorm = parts.k_layernorm = built.norm


def _dense(layer: ModuleSpec, built: BuiltWith) -> None:
    """Megatron's own MLP, which is there already, of our linear layers."""
    mlp = layer.submodules.mlp
    # megatron-core 0.16.1 has a spec there, 0.19.2 a partial of the class.
    parts = mlp.keywords["submodules"] if isinstance(mlp, partial) else mlp.submodules
    parts.linear_fc1, parts.linear_fc2 = ColumnLinear, RowLinear


def _mixture_of_experts(layer: ModuleSpec, built: BuiltWith) -> None:
    params = {
        "moe": built.run.model.moe,
        "kernel": built.run.kernels.experts,
        "swiglu": built.run.kernels.swiglu,
        "router": built.run.kernels.router,
        "groups": built.groups,
        "recompute": built.run.parallel.recompute is Recompute.moe,
        "linear": (ColumnLinear, RowLinear),
    }
    layer.submodules.mlp = ModuleSpec(module=ExpertParallelMLP, params=params)


Part = Callable[[ModuleSpec, BuiltWith], None]
"""Puts the modules of one kind into the spec of a layer."""

ATTENTION_SPECS: dict[AttentionKind, Part] = {AttentionKind.grouped_query: _grouped_query}
"""A kind that is not here cannot be built: parallel.legality refuses it."""
MLP_SPECS: dict[MlpKind, Part] = {MlpKind.dense: _dense, MlpKind.moe: _mixture_of_experts}


def block_spec(run: RunConfig, groups: ProcessGroups, layers: list[int]) -> TransformerBlockSubmodules:
    """The layers of one virtual stage.

    Args:
        layers: their indices in the whole model, from 0: a layer's kind depends on its place there.
    """
    built, kinds = BuiltWith(run=run, groups=groups, norm=norm_class(run.kernels.norm)), run.model.layer_kinds
    specs = [_layer_spec(kinds[layer], built) for layer in layers]
    if run.model.vision is not None:
        for layer, spec in zip(layers, specs, strict=True):
            spec.module, spec.params = VisionLayer, {"block": _gated_block(layer, built)}
    if run.parallel.recompute is Recompute.full:
        for spec in specs[: run.parallel.recompute_layers]:
            spec.module = RecomputedLayer if run.model.vision is None else RecomputedVisionLayer
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=built.norm)


def _layer_spec(kind: LayerKind, built: BuiltWith) -> ModuleSpec:
    spec = get_gpt_layer_local_spec(num_experts=None, normalization="RMSNorm")
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = built.norm
    ATTENTION_SPECS[kind.attention](spec, built)
    MLP_SPECS[kind.mlp](spec, built)
    return spec


def _gated_block(layer: int, built: BuiltWith) -> Callable[[Any], nn.Module] | None:
    """What makes the gated block before a layer, from Megatron's config; None: it has none."""
    model = built.run.model
    if not model.has_gated_block(layer):
        return None
    return partial(GatedCrossAttention, model=model, groups=built.groups, norm=built.norm)


class RecomputedLayer(TransformerLayer):  # type: ignore[misc]
    """parallel.recompute=full: the layer keeps only its input and runs its forward pass again in the backward pass.
    In evaluation it is a plain layer.

    Megatron's own loop (TransformerBlock with recompute_granularity="full") does not serve: where it recomputes only
    the first layers of a stage, it hands the others no padding_mask, so these count padding as tokens and have no token
    numbers to draw noise by (megatron-core 0.16.1). This class may go with 0.16.1: the loop of 0.19.2 hands it to every
    layer, and with recompute_method="block" tests/distributed/test_padding.py and test_recompute.py pass there.
    """

    def forward(
        self, hidden_states: Tensor, *, padding_mask: Tensor | None = None, context: Tensor | None = None, **rest: Any
    ) -> Any:
        """As TransformerBlock calls a layer: (hidden [S/tp, B, H], context).

        Args:
            context: latents of images, of a vision model.
            rest: nothing that a gradient flows to.
        """
        forward = super().forward

        def plain(hidden_states: Tensor, padding_mask: Tensor | None, context: Tensor | None) -> Any:
            return forward(hidden_states=hidden_states, padding_mask=padding_mask, context=context, **rest)[0]

        if not self.training:
            return plain(hidden_states, padding_mask, context), context
        needed = [*self.parameters(), *([] if context is None else [context])]
        if not hidden_states.requires_grad:  # everything before is frozen
            if not any(tensor.requires_grad for tensor in needed):
                return plain(hidden_states, padding_mask, context), context
            # Megatron's checkpoint makes no gradients where none of its inputs needs one.
            hidden_states = hidden_states.detach().requires_grad_()
        return tensor_parallel.checkpoint(plain, False, hidden_states, padding_mask, context), context


class RecomputedVisionLayer(RecomputedLayer, VisionLayer):
    """RecomputedLayer of a vision model: the gated block is computed again too."""

"""The layer tree: which class plays each part of a layer. Kernels are chosen by config and imported where used."""

import importlib
from collections.abc import Callable
from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import nn

from gpt4moe.config.parallel import Recompute
from gpt4moe.config.run import RunConfig
from gpt4moe.config.training import AttentionKernel, NormKernel
from gpt4moe.model.attention import SdpaAttention
from gpt4moe.model.recompute import RecomputedLayer
from gpt4moe.moe.layer import ExpertParallelMLP
from gpt4moe.parallel.groups import ProcessGroups


def _transformer_engine_attention() -> Any:
    return importlib.import_module("megatron.core.extensions.transformer_engine").TEDotProductAttention


def _apex_norm() -> type[nn.Module]:
    return importlib.import_module("apex.normalization").FusedRMSNorm


ATTENTION: dict[AttentionKernel, Callable[[], Any]] = {
    AttentionKernel.sdpa: lambda: SdpaAttention,
    AttentionKernel.transformer_engine: _transformer_engine_attention,
}
NORMS: dict[NormKernel, Callable[[], type[nn.Module]]] = {
    NormKernel.torch: lambda: nn.RMSNorm,
    NormKernel.apex: _apex_norm,
}


def norm_class(kernel: NormKernel) -> type[nn.Module]:
    """An RMSNorm in Megatron's seam; Megatron's own local one refuses sequence parallelism."""

    class Norm(NORMS[kernel]()):  # type: ignore[misc]
        def __init__(self, *, config: Any, hidden_size: int, eps: float, **_: Any):
            super().__init__(hidden_size, eps=eps)
            self.to(config.params_dtype)

    return Norm


def block_spec(run: RunConfig, groups: ProcessGroups, layers: list[int]) -> TransformerBlockSubmodules:
    """The layers of one virtual stage.

    Args:
        layers: their global indices, from 0: whether each has experts depends on its place in the whole model.
    """
    norm = norm_class(run.kernels.norm)
    specs = [_layer_spec(run, groups, run.model.moe_layers[layer], norm) for layer in layers]
    if run.parallel.recompute is Recompute.full:
        for spec in specs[: run.parallel.recompute_layers]:
            spec.module = RecomputedLayer
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=norm)


def _layer_spec(run: RunConfig, groups: ProcessGroups, has_experts: bool, norm: type[nn.Module]) -> ModuleSpec:
    spec = get_gpt_layer_local_spec(num_experts=None, normalization="RMSNorm")
    parts = spec.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = norm
    attention = parts.self_attention.submodules
    attention.core_attention = ATTENTION[run.kernels.attention]()
    if run.model.qk_norm:
        attention.q_layernorm = attention.k_layernorm = norm
    if has_experts:
        params = {
            "moe": run.model.moe,
            "kernel": run.kernels.experts,
            "groups": groups,
            "recompute": run.parallel.recompute is Recompute.moe,
        }
        parts.mlp = ModuleSpec(module=ExpertParallelMLP, params=params)
    return spec

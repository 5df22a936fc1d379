"""Megatron-core's own MoELayer on a CPU, with the weights of one of our layers."""

from typing import Any

import torch

from gpt4moe.parallel.cpu_device import BuildOnCpu
from tests.moe.case import FFN, HIDDEN


def megatron_config(num_experts: int, top_k: int, **settings: Any) -> Any:
    """The TransformerConfig of one layer. Its all-gather dispatcher: the all-to-all one needs CUDA streams."""
    from megatron.core.transformer import TransformerConfig

    return TransformerConfig(
        num_layers=1, hidden_size=HIDDEN, num_attention_heads=1, num_moe_experts=num_experts, moe_router_topk=top_k,
        moe_ffn_hidden_size=FFN, moe_token_dispatcher_type="allgather", moe_router_dtype="fp32",
        gated_linear_unit=True, activation_func=torch.nn.functional.silu, add_bias_linear=False,
        bias_activation_fusion=False, gradient_accumulation_fusion=False, use_cpu_initialization=True, **settings,
    )  # fmt: skip


def megatron_layer(groups: Any, config: Any, layer: Any) -> Any:
    """Megatron's layer with `layer`'s weights, and its bias and shared experts where it has them."""
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.transformer.moe import moe_utils

    # Without Transformer Engine megatron-core 0.16.1 reads this name although it never imported it; 0.19.2 sets it so.
    moe_utils.te_general_gemm = None
    with BuildOnCpu():
        spec = get_moe_module_spec(use_te=False, num_experts=config.num_moe_experts, moe_grouped_gemm=False)
        theirs = spec(config=config, pg_collection=groups.megatron)
    theirs.set_layer_number(1)
    with torch.no_grad():
        theirs.router.weight.copy_(layer.router.weight)
        if theirs.router.expert_bias is not None:
            theirs.router.expert_bias.copy_(layer.router.bias)
        for name in ("gate_up", "down"):
            for weight, values in zip(expert_weights(theirs, name), getattr(layer.experts, name), strict=True):
                weight.copy_(values)
        for name in ("linear_fc1", "linear_fc2") if layer.shared_experts is not None else ():
            getattr(theirs.shared_experts, name).weight.copy_(getattr(layer.shared_experts, name).weight)
    return theirs


def expert_weights(theirs: Any, name: str) -> list[torch.nn.Parameter]:
    """Of each expert: what ours keeps as gate_up or down."""
    linear = {"gate_up": "linear_fc1", "down": "linear_fc2"}[name]
    return [getattr(expert, linear).weight for expert in theirs.experts.local_experts]


def expert_gradients(theirs: Any) -> dict[str, torch.Tensor]:
    """By our names, [E, ...]."""
    return {
        name: torch.stack([weight.grad for weight in expert_weights(theirs, name)])  # type: ignore[misc]
        for name in ("gate_up", "down")
    }

"""Shared experts: a dense SwiGLU beside the routed ones, which every token goes through (DeepSeekMoE, 2401.06066).

    hidden [S/tp, B, H] --gather over tp--> [S, B, H] -> SwiGLU, ffn cut over tp --reduce-scatter--> [S/tp, B, H]

Several of one width are one SwiGLU of their widths together. Megatron's MLP, tensor parallel with sequence parallelism.
"""

from copy import copy
from typing import Any

from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP, MLPSubmodules

from gpt4moe.parallel.groups import ProcessGroups


def build_shared_experts(config: Any, ffn_hidden_size: int, groups: ProcessGroups) -> MLP:
    """Args:
    config: Megatron's TransformerConfig, with gated SwiGLU and no biases.
    """
    parts = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    # MLP takes the first matrix's width from its argument but the second's from its config (megatron-core 0.16.1).
    config = copy(config)
    config.ffn_hidden_size = ffn_hidden_size
    return MLP(config, parts, ffn_hidden_size=ffn_hidden_size, tp_group=groups.tp)

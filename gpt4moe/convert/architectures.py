"""The architectures of Hugging Face that a model of ours can be: one row each, and which one a model is. No torch.

             every layer a mixture     dense layers      some of each
plain        Mixtral                   Llama, Mistral    none of them
qk_norm      Qwen3-MoE                 Qwen3             Qwen3-MoE
"""

from dataclasses import dataclass
from typing import Any

from gpt4moe.config.model import ModelConfig
from gpt4moe.config.moe import MoEConfig, RouterKind
from gpt4moe.convert.rules import Row
from gpt4moe.convert.tables import DENSE, MIXTRAL, MIXTRAL_FUSED, QWEN3_MOE, QWEN3_MOE_FUSED
from gpt4moe.errors import ConversionError

Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """What a config.json with this model_type means where it leaves something out, and where it says what."""

    model_type: str
    class_name: str
    rows: tuple[Row, ...]
    fused: tuple[Row, ...] | None = None
    """The names with all experts of a layer in one tensor; None: no such names."""
    qk_norm: bool = False
    num_experts_key: str | None = None
    """None: a dense architecture."""
    expert_width_key: str = "intermediate_size"
    rope_theta: float = 1e4
    norm_epsilon: float = 1e-6
    head_dim: int | None = None
    """None: hidden_size / num_attention_heads."""
    is_windowed: bool = True
    """Whether sliding_window counts without a use_sliding_window."""
    constants: Json
    """What an export says beside the model's sizes."""


ARCHITECTURES = {
    architecture.model_type: architecture
    for architecture in (
        Architecture(
            model_type="mixtral", class_name="MixtralForCausalLM", rows=MIXTRAL, fused=MIXTRAL_FUSED,
            num_experts_key="num_local_experts", rope_theta=1e6, norm_epsilon=1e-5,
            constants={"router_jitter_noise": 0.0, "output_router_logits": False, "sliding_window": None},
        ),
        Architecture(
            model_type="qwen3_moe", class_name="Qwen3MoeForCausalLM", rows=QWEN3_MOE, fused=QWEN3_MOE_FUSED,
            qk_norm=True, num_experts_key="num_experts", expert_width_key="moe_intermediate_size", is_windowed=False,
            constants={
                "norm_topk_prob": True, "decoder_sparse_step": 1, "output_router_logits": False,
                "attention_bias": False, "use_sliding_window": False, "sliding_window": None,
            },
        ),
        Architecture(
            model_type="llama", class_name="LlamaForCausalLM", rows=DENSE,
            constants={"attention_bias": False, "mlp_bias": False},
        ),
        Architecture(
            model_type="qwen3", class_name="Qwen3ForCausalLM", rows=DENSE, qk_norm=True, head_dim=128,
            is_windowed=False, constants={"attention_bias": False, "use_sliding_window": False, "sliding_window": None},
        ),
        Architecture(model_type="mistral", class_name="MistralForCausalLM", rows=DENSE, constants={}),
    )
}  # fmt: skip
KNOWN = "Mixtral, Qwen3-MoE, Llama, Mistral or Qwen3"


def architecture_of(model: ModelConfig) -> Architecture:
    """What a model of ours is exported as. Raises: ConversionError naming the field that no architecture says."""
    if model.moe is None:
        return ARCHITECTURES["qwen3" if model.qk_norm else "llama"]
    for field, value, is_so, why in _unsayable(model.moe):
        if is_so:
            raise ConversionError(
                f"model.moe.{field}={value}: {why}.",
                "Convert with to-inference instead, or train with router@model.moe.router=top2 and without shared "
                "experts.",
            )
    if model.qk_norm:
        return ARCHITECTURES["qwen3_moe"]
    if not all(model.moe_layers):
        dense = [layer for layer, is_moe in enumerate(model.moe_layers) if not is_moe]
        raise ConversionError(
            f"model.moe.layer_pattern makes layers {dense} dense; every layer of a Mixtral is a mixture.",
            "Convert with to-inference instead, or train with model.moe.layer_pattern=null, or with model.qk_norm=true "
            "(Qwen3-MoE may have dense layers).",
        )
    return ARCHITECTURES["mixtral"]


def architecture_named(config: Json) -> Architecture:
    """The row of a config.json. Raises: ConversionError when there is none."""
    kind = str(config.get("model_type"))
    if kind in ARCHITECTURES:
        return ARCHITECTURES[kind]
    why = {"qwen2_moe": "has biases in attention and a shared expert"}.get(kind, "is another architecture")
    raise ConversionError(
        f"config.json: model_type={kind} {why}, which model.* cannot say.", f"Convert a {KNOWN} folder."
    )


def _unsayable(moe: MoEConfig) -> list[tuple[str, object, bool, str]]:
    """What neither Mixtral nor Qwen3-MoE can be: (field of model.moe, its value, whether it is so here, why)."""
    router, shared = moe.router, moe.shared_expert_ffn_hidden_size
    weights = "Mixtral and Qwen3-MoE take a softmax and renormalise it over the chosen experts"
    return [
        ("router.kind", router.kind.value, router.kind is not RouterKind.topk, weights),
        ("router.scaling_factor", router.scaling_factor, router.scaling_factor != 1, weights),
        ("shared_expert_ffn_hidden_size", shared, shared is not None, "Mixtral and Qwen3-MoE have no shared experts"),
    ]


def export_notes(model: ModelConfig) -> list[str]:
    """What is true of the model in training and not in the export."""
    factor = model.moe.router.capacity_factor if model.moe is not None else None
    if factor is None:
        return []
    return [f"Trained with model.moe.router.capacity_factor={factor:g}; the exported model drops no token."]

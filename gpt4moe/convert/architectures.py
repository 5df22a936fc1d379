"""The Hugging Face architectures that convert, one row each. A model is exported as the first architecture that fits.

             every layer has experts   no experts        some layers have experts
plain        Mixtral                   Llama, Mistral    none of them
qk_norm      Qwen3-MoE                 Qwen3             Qwen3-MoE

A new architecture is one row here and, where its tensors have names of their own, one table in tables.py. No torch.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from gpt4moe.config.model import ModelConfig
from gpt4moe.config.moe import MoEConfig, RouterKind
from gpt4moe.convert.rules import NameRow
from gpt4moe.convert.tables import LLAMA, MIXTRAL, MIXTRAL_FUSED, QWEN3_MOE, QWEN3_MOE_FUSED
from gpt4moe.errors import ConversionError

Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """One model_type of config.json: tensor names, defaults, and which of our models it can represent."""

    name: str
    """Name for messages."""
    model_type: str
    class_name: str
    rows: tuple[NameRow, ...]
    fused: tuple[NameRow, ...] | None = None
    """Table of names that puts all experts of a layer into one tensor; None if there is none."""
    qk_norm: bool = False
    num_experts_key: str | None = None
    """Key of config.json with the number of experts; None: a dense architecture."""
    expert_width_key: str = "intermediate_size"
    has_dense_layers: bool = False
    """Whether some layers may be dense where others have experts (mlp_only_layers)."""
    router_kind: RouterKind = RouterKind.topk
    rope_theta: float = 1e4
    """Default, if config.json has no value; so are the next two."""
    norm_epsilon: float = 1e-6
    head_dim: int | None = None
    """None: hidden_size / num_attention_heads."""
    is_windowed: bool = True
    """Whether sliding_window applies if config.json has no use_sliding_window."""
    required: Json = field(default_factory=dict)
    """Settings that must have this value in config.json. With another value the model computes what ours cannot. A
    setting that neither this names nor hf_config.py reads is refused, so a row that forgets one converts nothing."""
    constants: Json
    """Settings that an export writes besides the model's sizes."""


ARCHITECTURES = {
    architecture.model_type: architecture
    for architecture in (
        Architecture(
            name="Mixtral", model_type="mixtral", class_name="MixtralForCausalLM", rows=MIXTRAL, fused=MIXTRAL_FUSED,
            num_experts_key="num_local_experts", rope_theta=1e6, norm_epsilon=1e-5,
            constants={"router_jitter_noise": 0.0, "output_router_logits": False, "sliding_window": None},
        ),
        Architecture(
            name="Qwen3-MoE", model_type="qwen3_moe", class_name="Qwen3MoeForCausalLM", rows=QWEN3_MOE,
            fused=QWEN3_MOE_FUSED, qk_norm=True, num_experts_key="num_experts",
            expert_width_key="moe_intermediate_size", has_dense_layers=True, is_windowed=False,
            required={"norm_topk_prob": True},
            constants={
                "norm_topk_prob": True, "decoder_sparse_step": 1, "output_router_logits": False,
                "attention_bias": False, "use_sliding_window": False, "sliding_window": None,
            },
        ),
        Architecture(
            name="Llama", model_type="llama", class_name="LlamaForCausalLM", rows=LLAMA,
            constants={"attention_bias": False, "mlp_bias": False},
        ),
        Architecture(
            name="Qwen3", model_type="qwen3", class_name="Qwen3ForCausalLM", rows=LLAMA, qk_norm=True, head_dim=128,
            is_windowed=False, constants={"attention_bias": False, "use_sliding_window": False, "sliding_window": None},
        ),
        # Import only: such a model is exported as Llama, whose row comes first.
        Architecture(
            name="Mistral", model_type="mistral", class_name="MistralForCausalLM", rows=LLAMA, constants={},
        ),
    )
}  # fmt: skip
_NEAR_MISSES = {"qwen2_moe": "has biases in attention and a shared expert"}
"""Why a model_type that people try does not convert."""


@dataclass(frozen=True, slots=True)
class _Requirement:
    """A setting of our model that some architectures do not have."""

    is_met: Callable[[ModelConfig, Architecture], bool]
    setting: Callable[[ModelConfig], str]
    """The setting with its value, for the error message."""
    has_instead: str
    cure: str


_CURE = "Convert with to-inference instead, or train with router@model.moe.router=top2 and without shared experts."
_WEIGHTS = "takes a softmax over the experts and renormalises it over the chosen ones"
_REQUIREMENTS = (
    _Requirement(
        lambda model, architecture: model.moe is None or model.moe.router.kind is architecture.router_kind,
        lambda model: f"model.moe.router.kind={_moe(model).router.kind.value}", _WEIGHTS, _CURE,
    ),
    _Requirement(
        lambda model, _: model.moe is None or model.moe.router.scaling_factor == 1,
        lambda model: f"model.moe.router.scaling_factor={_moe(model).router.scaling_factor}", _WEIGHTS, _CURE,
    ),
    _Requirement(
        lambda model, _: model.moe is None or model.moe.shared_expert_ffn_hidden_size is None,
        lambda model: f"model.moe.shared_expert_ffn_hidden_size={_moe(model).shared_expert_ffn_hidden_size}",
        "has no shared experts", _CURE,
    ),
    _Requirement(
        lambda model, architecture: model.moe is None or architecture.has_dense_layers or all(model.moe_layers),
        lambda model: (
            "model.moe.layer_pattern (or dense_first_layers, layer_frequency) makes layers "
            f"{[layer for layer, is_moe in enumerate(model.moe_layers) if not is_moe]} dense"
        ),
        "has experts in every layer",
        "Convert with to-inference instead, or train with model.moe.layer_pattern=null, or with model.qk_norm=true "
        "(Qwen3-MoE may have dense layers).",
    ),
    _Requirement(
        lambda model, architecture: model.qk_norm is architecture.qk_norm,
        lambda model: f"model.qk_norm={str(model.qk_norm).lower()}", "has other norms in attention",
        "Convert with to-inference instead.",
    ),
)  # fmt: skip
"""What an architecture needs for a model, besides having experts or not; in the order of error messages."""


def known_names() -> str:
    """The architectures that convert: `Mixtral, ... or Mistral`."""
    *names, last = (architecture.name for architecture in ARCHITECTURES.values())
    return f"{', '.join(names)} or {last}"


def architecture_of(model: ModelConfig) -> Architecture:
    """The architecture that a model is exported as: the first that can hold it.

    Raises: ConversionError naming the setting that the nearest architecture does not have.
    """
    candidates = [
        (architecture, [requirement for requirement in _REQUIREMENTS if not requirement.is_met(model, architecture)])
        for architecture in ARCHITECTURES.values()
        if (architecture.num_experts_key is not None) == (model.moe is not None)
    ]
    architecture, missing = min(candidates, key=lambda candidate: len(candidate[1]))
    for requirement in missing:
        raise ConversionError(
            f"{requirement.setting(model)}: {architecture.name}, the nearest architecture of Hugging Face that "
            f"converts here, {requirement.has_instead}.",
            requirement.cure,
        )
    return architecture


def architecture_named(config: Json) -> Architecture:
    """The row of a config.json. Raises: ConversionError when there is none."""
    kind = str(config.get("model_type"))
    if kind in ARCHITECTURES:
        return ARCHITECTURES[kind]
    why = _NEAR_MISSES.get(kind, "is another architecture")
    raise ConversionError(
        f"config.json: model_type={kind} {why}, which model.* has no settings for.",
        f"Convert a {known_names()} folder.",
    )


def export_notes(model: ModelConfig) -> list[str]:
    """Differences between the trained model and the exported one, as sentences."""
    factor = model.moe.router.capacity_factor if model.moe is not None else None
    if factor is None:
        return []
    return [f"Trained with model.moe.router.capacity_factor={factor:g}; the exported model drops no token."]


def _moe(model: ModelConfig) -> MoEConfig:
    assert model.moe is not None
    return model.moe

"""ModelConfig <-> config.json of Hugging Face, and what neither side can say to the other. No torch."""

from typing import Any

from gpt4moe.config.model import ModelConfig
from gpt4moe.config.moe import MoEConfig, RouterConfig, RouterKind
from gpt4moe.convert.rules import Row
from gpt4moe.convert.tables import LLAMA, MIXTRAL
from gpt4moe.errors import ConversionError

Json = dict[str, Any]

ROPE_THETA = {"mixtral": 1e6, "llama": 1e4, "mistral": 1e4}
"""model_type -> what a config.json without rope_theta means."""
_NORM_EPSILON = {"mixtral": 1e-5, "llama": 1e-6, "mistral": 1e-6}


def hf_table(model: ModelConfig) -> tuple[Row, ...]:
    """The table of names for a model of ours. Raises: ConversionError naming the field that the format cannot say."""
    if model.qk_norm:
        raise ConversionError(
            "model.qk_norm=true normalises queries and keys, which neither Mixtral nor Llama does.",
            "Convert with to-inference instead, or train with model.qk_norm=false.",
        )
    if model.moe is None:
        return LLAMA
    if not all(model.moe_layers):
        dense = [layer for layer, is_moe in enumerate(model.moe_layers) if not is_moe]
        raise ConversionError(
            f"model.moe.layer_pattern makes layers {dense} dense; every layer of a Mixtral is a mixture.",
            "Convert with to-inference instead, or train with model.moe.layer_pattern=null.",
        )
    if model.moe.router.kind is not RouterKind.topk:
        raise ConversionError(
            f"model.moe.router.kind={model.moe.router.kind.value} weights an expert by its raw probability; Mixtral "
            "renormalises over the chosen ones.",
            "Convert with to-inference instead, or train with router@model.moe.router=top2.",
        )
    return MIXTRAL


def export_notes(model: ModelConfig) -> list[str]:
    """What is true of the model in training and not in the export."""
    factor = model.moe.router.capacity_factor if model.moe is not None else None
    if factor is None:
        return []
    return [f"Trained with model.moe.router.capacity_factor={factor:g}; the exported model drops no token."]


def to_config(model: ModelConfig, *, dtype: str, eos_id: int | None) -> Json:
    """config.json. rope_theta stands twice: engines before transformers 5 read only the first."""
    is_mixture = model.moe is not None
    config: Json = {
        "architectures": ["MixtralForCausalLM" if is_mixture else "LlamaForCausalLM"],
        "model_type": "mixtral" if is_mixture else "llama",
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.moe.ffn_hidden_size if model.moe is not None else model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.query_groups,
        "head_dim": model.head_size,
        "hidden_act": "silu",
        "max_position_embeddings": model.seq_length,
        "initializer_range": model.init_std,
        "rms_norm_eps": model.norm_epsilon,
        "rope_theta": model.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "attention_dropout": 0.0,
        "tie_word_embeddings": model.tied_embeddings,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": eos_id,
        "pad_token_id": eos_id,
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    if model.moe is not None:
        config |= {
            "num_local_experts": model.moe.num_experts,
            "num_experts_per_tok": model.moe.top_k,
            "router_aux_loss_coef": model.moe.router.load_balancing_coefficient,
            "router_jitter_noise": 0.0,
            "output_router_logits": False,
            "sliding_window": None,
        }
    else:
        config |= {"attention_bias": False, "mlp_bias": False}
    return config


def from_config(config: Json, name: str) -> ModelConfig:
    """The model of a config.json (Mixtral, Llama or Mistral). Raises: ConversionError naming what ours cannot say."""
    kind = config.get("model_type")
    if kind not in ROPE_THETA:
        raise _unknown_architecture(kind)
    _refuse_unsayable(config)
    try:
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        moe = None
        if kind == "mixtral":
            moe = MoEConfig(
                num_experts=config["num_local_experts"],
                ffn_hidden_size=config["intermediate_size"],
                top_k=config["num_experts_per_tok"],
                router=RouterConfig(load_balancing_coefficient=config.get("router_aux_loss_coef", 0.001)),
            )
        return ModelConfig(
            name=name,
            num_layers=config["num_hidden_layers"],
            hidden_size=hidden,
            num_attention_heads=heads,
            num_query_groups=config.get("num_key_value_heads") or heads,
            ffn_hidden_size=None if moe else config["intermediate_size"],
            seq_length=min(config["max_position_embeddings"], config.get("sliding_window") or 2**31),
            vocab_size=config["vocab_size"],
            tied_embeddings=config.get("tie_word_embeddings", False),
            rope_theta=_rope_theta(config, ROPE_THETA[kind]),
            norm_epsilon=config.get("rms_norm_eps", _NORM_EPSILON[kind]),
            init_std=config.get("initializer_range", 0.02),
            moe=moe,
        )
    except KeyError as error:
        raise ConversionError(f"config.json has no {error.args[0]}.", "Take the config.json of the model.") from error


def _unknown_architecture(kind: object) -> ConversionError:
    why = {
        "qwen3_moe": "normalises queries and keys (self_attn.q_norm, self_attn.k_norm)",
        "qwen2_moe": "has biases in attention and a shared expert",
    }.get(str(kind), "is another architecture")
    return ConversionError(
        f"config.json: model_type={kind} {why}, which model.* cannot say.",
        "Convert a Mixtral, Llama or Mistral folder.",
    )


def _refuse_unsayable(config: Json) -> None:
    heads, hidden = config.get("num_attention_heads", 1), config.get("hidden_size", 1)
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    unsayable = {
        "hidden_act": config.get("hidden_act", "silu") != "silu",
        "attention_bias": bool(config.get("attention_bias")),
        "mlp_bias": bool(config.get("mlp_bias")),
        "quantization_config": config.get("quantization_config") is not None,
        "head_dim": (config.get("head_dim") or hidden // heads) * heads != hidden,
        "rope_scaling": rope.get("rope_type", rope.get("type", "default")) != "default",
        "partial_rotary_factor": {1.0, config.get("partial_rotary_factor", 1.0), rope.get("partial_rotary_factor", 1.0)}
        != {1.0},
    }
    for key, is_so in unsayable.items():
        if is_so:
            value = config.get(key, rope if key == "rope_scaling" else None)
            raise ConversionError(
                f"config.json: {key}={value} has no counterpart in model.*.",
                "Only plain Mixtral, Llama and Mistral models convert.",
            )


def _rope_theta(config: Json, default: float) -> float:
    sources = (config, config.get("rope_parameters") or {})
    given = {float(source["rope_theta"]) for source in sources if source.get("rope_theta") is not None}
    if len(given) > 1:
        raise ConversionError(
            f"config.json: rope_theta and rope_parameters.rope_theta differ: {sorted(given)}.", "Correct one of them."
        )
    theta = given.pop() if given else default
    if not theta.is_integer():
        raise ConversionError(f"config.json: rope_theta={theta} is no whole number.", "model.rope_theta is one.")
    return theta

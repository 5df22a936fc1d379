"""ModelConfig <-> config.json of Hugging Face; settings without a counterpart are refused. No torch."""

from collections.abc import Mapping
from math import inf
from typing import Any

from gpt4moe.config.model import MOST_LAYERS, ModelConfig
from gpt4moe.config.moe import MoEConfig, RouterConfig
from gpt4moe.convert.architectures import Architecture, architecture_named, architecture_of, known_names
from gpt4moe.errors import ConversionError

Json = dict[str, Any]

_WHOLE, _NUMBER, _NONE = (int,), (int, float), (type(None),)
_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(
        ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size", "max_position_embeddings",
         "intermediate_size", "num_local_experts", "num_experts", "num_experts_per_tok", "moe_intermediate_size"),
        _WHOLE,
    ),
    **dict.fromkeys(("num_key_value_heads", "head_dim", "decoder_sparse_step", "sliding_window"), _WHOLE + _NONE),
    **dict.fromkeys(("bos_token_id", "pad_token_id"), _WHOLE + _NONE),
    **dict.fromkeys(("rms_norm_eps", "initializer_range", "router_aux_loss_coef", "partial_rotary_factor"), _NUMBER),
    "rope_theta": _NUMBER + _NONE, "rope_parameters": (dict, *_NONE), "rope_scaling": (dict, *_NONE),
    "eos_token_id": (int, list, *_NONE), "mlp_only_layers": (list, *_NONE), "layer_types": (list, *_NONE),
    "tie_word_embeddings": (bool,), "use_sliding_window": (bool,),
}  # fmt: skip
_ATTENTION = {"full_attention", "sliding_attention"}
_CHECKED = {"hidden_act", "attention_bias", "mlp_bias", "quantization_config"}
_WITHOUT_EFFECT = {
    # What the folder is and who wrote it.
    "_name_or_path", "architectures", "model_type", "transformers_version", "dtype", "torch_dtype", "tokenizer_class",
    "transformers.js_config", "is_llama_config", "unsloth_fixed", "unsloth_version", "id2label", "label2id",
    # How to run it: the numbers stay the same.
    "use_cache", "return_dict", "output_attentions", "output_hidden_states", "output_router_logits", "pretraining_tp",
    "chunk_size_feed_forward", "_attn_implementation_autoset", "max_window_layers",
    # Training alone.
    "attention_dropout", "residual_dropout", "router_jitter_noise",
    # Sampling, in folders of old releases.
    "do_sample", "max_length", "temperature", "top_k", "top_p",
}  # fmt: skip
"""Settings of config.json that leave the forward pass as it is; max_window_layers, because a model reads no more tokens
than its window has."""


def to_config(model: ModelConfig, *, dtype: str, special: Mapping[str, object]) -> Json:
    """config.json. rope_theta is in it twice: programs before transformers 5 read only the first."""
    architecture, moe = architecture_of(model), model.moe
    config: Json = {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_type,
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size or (moe.ffn_hidden_size if moe else None),
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
        **special,
        "dtype": dtype,
        "torch_dtype": dtype,
        **architecture.constants,
    }
    if not architecture.is_windowed:
        config["max_window_layers"] = model.num_layers  # mistral.rs requires it, even without windows
    if moe is not None and architecture.num_experts_key is not None:
        config |= {
            architecture.num_experts_key: moe.num_experts,
            architecture.expert_width_key: moe.ffn_hidden_size,
            "num_experts_per_tok": moe.top_k,
            "router_aux_loss_coef": moe.router.load_balancing_coefficient,
        }
        if architecture.has_dense_layers:
            config["mlp_only_layers"] = [layer for layer, is_moe in enumerate(model.moe_layers) if not is_moe]
    return config


def from_config(config: Json, name: str) -> ModelConfig:
    """The model of a config.json. Raises: ConversionError naming a setting that ModelConfig does not have."""
    architecture = architecture_named(config)
    _require_kinds(config)
    _require_elements(config)
    if config.get("num_hidden_layers", 0) > MOST_LAYERS:  # before a list of them is made
        raise ConversionError(
            f"config.json: num_hidden_layers={config['num_hidden_layers']} is above {MOST_LAYERS}.",
            "Take the config.json of the model.",
        )
    _refuse_unsupported(config, architecture)
    try:
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        moe = _mixture(config, architecture)
        head_dim = config.get("head_dim") or architecture.head_dim
        has_window = config.get("use_sliding_window", architecture.is_windowed)
        window = config.get("sliding_window") if has_window else None
        is_all_moe = moe is not None and moe.layer_pattern is None
        return ModelConfig(
            name=name,
            num_layers=config["num_hidden_layers"],
            hidden_size=hidden,
            num_attention_heads=heads,
            num_query_groups=config.get("num_key_value_heads") or heads,
            head_dim=head_dim if head_dim is not None and head_dim * heads != hidden else None,
            qk_norm=architecture.qk_norm,
            ffn_hidden_size=None if is_all_moe else config["intermediate_size"],
            seq_length=min(config["max_position_embeddings"], window or 2**31),
            vocab_size=config["vocab_size"],
            tied_embeddings=config.get("tie_word_embeddings", False),
            rope_theta=_rope_theta(config, architecture.rope_theta),
            norm_epsilon=config.get("rms_norm_eps", architecture.norm_epsilon),
            init_std=config.get("initializer_range", 0.02),
            moe=moe,
        )
    except KeyError as error:
        raise ConversionError(f"config.json has no {error.args[0]}.", "Take the config.json of the model.") from error


def _mixture(config: Json, architecture: Architecture) -> MoEConfig | None:
    if architecture.num_experts_key is None:
        return None
    # For Qwen3-MoE, transformers writes the number of experts under Mixtral's key.
    keys = [key for key in (architecture.num_experts_key, "num_local_experts") if key in config]
    return MoEConfig(
        num_experts=config[keys[0] if keys else architecture.num_experts_key],
        ffn_hidden_size=config[architecture.expert_width_key],
        top_k=config["num_experts_per_tok"],
        layer_pattern=_layer_pattern(config),
        router=RouterConfig(load_balancing_coefficient=config.get("router_aux_loss_coef", 0.001)),
    )


def _layer_pattern(config: Json) -> list[int] | None:
    """model.moe.layer_pattern, from a list of dense layers and from every n-th layer having experts (Qwen3-MoE)."""
    dense, step = set(config.get("mlp_only_layers") or []), config.get("decoder_sparse_step", 1)
    if step is None or step < 1:
        raise ConversionError(
            f"config.json: decoder_sparse_step={step} is below 1.", "Take the config.json of the model."
        )
    pattern = [
        int(layer not in dense and (layer + 1) % step == 0) for layer in range(config["num_hidden_layers"])
    ]  # fmt: skip
    if not any(pattern):
        raise ConversionError(
            f"config.json: mlp_only_layers={sorted(dense)} and decoder_sparse_step={step} leave no layer a mixture.",
            "Take the config.json of the model.",
        )
    return None if all(pattern) else pattern


def _require_kinds(config: Json) -> None:
    for key, kinds in _KINDS.items():
        value = config.get(key)
        is_odd = not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)
        if key in config and is_odd:
            names = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
            raise ConversionError(f"config.json: {key}={value!r} is no {names}.", "Take the config.json of the model.")


def _require_elements(config: Json) -> None:
    for key, kind in (("mlp_only_layers", int), ("layer_types", str), ("eos_token_id", int)):
        given = config.get(key)
        values = given if isinstance(given, list) else []
        odd = [value for value in values if not isinstance(value, kind) or isinstance(value, bool)]
        if odd:
            raise ConversionError(f"config.json: {key} has {odd[0]!r}.", "Take the config.json of the model.")


def _refuse_unsupported(config: Json, architecture: Architecture) -> None:
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    unsupported = {
        "hidden_act": config.get("hidden_act", "silu") != "silu",
        "attention_bias": bool(config.get("attention_bias")),
        "mlp_bias": bool(config.get("mlp_bias")),
        "quantization_config": config.get("quantization_config") is not None,
        "layer_types": bool(set(config.get("layer_types") or []) - _ATTENTION),
        **{key: config.get(key) != value for key, value in architecture.required.items()},
        "rope_parameters": any(isinstance(value, (dict, list)) for value in rope.values()),  # one set for each kind
        "rope_scaling": rope.get("rope_type", rope.get("type", "default")) != "default",
        "partial_rotary_factor": {1.0, config.get("partial_rotary_factor", 1.0), rope.get("partial_rotary_factor", 1.0)}
        != {1.0},
    }
    for key, is_so in unsupported.items():
        if is_so:
            value = config.get(key, rope if key == "rope_scaling" else None)
            raise ConversionError(
                f"config.json: {key}={value} has no counterpart in model.*.",
                f"Only plain {known_names()} models convert.",
            )
    known = {*_KINDS, *_CHECKED, *_WITHOUT_EFFECT, *architecture.required, *architecture.constants}
    unknown = [key for key, value in config.items() if key not in known and value not in (None, False, "", [], {})]
    if unknown:
        raise ConversionError(
            f"config.json: nothing here reads {unknown[0]}={config[unknown[0]]}, which may change what the model "
            f"computes.{' Nor ' + ', '.join(unknown[1:]) + '.' if unknown[1:] else ''}",
            "If it changes nothing, delete it from a copy of config.json. In a new row of convert/architectures.py, "
            "name in `required` the value with which the model computes what ours does.",
        )


def _rope_theta(config: Json, default: float) -> float:
    sources = (config, config.get("rope_parameters") or {})
    thetas = [source["rope_theta"] for source in sources if source.get("rope_theta") is not None]
    if not all(isinstance(theta, (int, float)) for theta in thetas):
        raise ConversionError(f"config.json: rope_theta={thetas} is no number.", "Take the config.json of the model.")
    given = set(map(float, thetas))
    if len(given) > 1:
        raise ConversionError(
            f"config.json: rope_theta and rope_parameters.rope_theta differ: {sorted(given)}.", "Correct one of them."
        )
    theta = given.pop() if given else default
    if not 0 < theta < inf:
        raise ConversionError(
            f"config.json: rope_theta={theta} is no positive number.", "Take the config.json of the model."
        )
    return theta

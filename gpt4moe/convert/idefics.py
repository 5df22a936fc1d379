"""A vision model as transformers' Idefics (IdeficsForVisionText2Text), where Idefics can be one. No torch.

    text model       Llama's names and numbers
    vision parts     vision_tables.py, behind `model.`
    encoder          a CLIP's, behind `model.vision_model.`

Idefics has one width for the MLPs of layers and gated blocks, as many keys as query heads, and CLIP's class token and
norm before the encoder. REQUIREMENTS says what else.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt4moe.config.model import ModelConfig
from gpt4moe.convert.adapters import open_checkpoint
from gpt4moe.convert.encoder_files import PROCESSOR, Encoder
from gpt4moe.convert.export import DTYPES, Export
from gpt4moe.convert.folder_tensors import new_tensor
from gpt4moe.convert.model_files import tokenizer_files
from gpt4moe.convert.publish import refuse_existing
from gpt4moe.convert.rules import links, require_whole
from gpt4moe.convert.safetensors_file import NewTensor
from gpt4moe.convert.tables import LLAMA
from gpt4moe.convert.vision_folder import Vision, vision_of_checkpoint
from gpt4moe.convert.vision_tables import TIME_EMBEDDINGS, config_of, vision_links
from gpt4moe.convert.weights import CheckpointWeights
from gpt4moe.errors import ConversionError

Answer = dict[str, Any]
Json = dict[str, Any]
_INSTEAD = "Convert with to-hf: its vision/ folder and examples/load_vision.py take every vision model."
_CLIP = "clip_vision_model"


@dataclass(frozen=True, slots=True)
class _Requirement:
    """What Idefics needs of a model."""

    is_met: Callable[[ModelConfig, str], bool]
    """Of a model and its encoder's kind."""
    setting: Callable[[ModelConfig, str], str]
    has_instead: str
    cure: str = _INSTEAD


REQUIREMENTS = (
    _Requirement(lambda m, _: m.moe is None, lambda m, _: f"model.moe={m.moe and m.moe.num_experts} experts",
                 "has no experts"),
    _Requirement(lambda m, _: not m.qk_norm, lambda m, _: "model.qk_norm=true", "has other norms in attention"),
    _Requirement(lambda m, _: m.query_groups == m.num_attention_heads,
                 lambda m, _: f"model.num_query_groups={m.query_groups}",
                 "has a key and a value for every query head"),
    _Requirement(lambda m, _: m.head_size * m.num_attention_heads == m.hidden_size,
                 lambda m, _: f"model.head_dim={m.head_dim}", "has heads of hidden_size / num_attention_heads"),
    _Requirement(lambda m, _: config_of(m).ffn_hidden_size == m.ffn_hidden_size,
                 lambda m, _: f"model.vision.ffn_hidden_size={config_of(m).ffn_hidden_size}",
                 "has gated blocks as wide as its layers (model.ffn_hidden_size)"),
    _Requirement(lambda m, _: m.num_layers % config_of(m).cross_attention_every == 0,
                 lambda m, _: f"model.vision.cross_attention_every={config_of(m).cross_attention_every} of "
                 f"model.num_layers={m.num_layers}",
                 "has num_layers // cross_attention_every gated blocks, without a remainder"),
    _Requirement(lambda m, _: config_of(m).resampler_ffn == 4 * config_of(m).width,
                 lambda m, _: f"model.vision.resampler.ffn_hidden_size={config_of(m).resampler_ffn}",
                 "has a resampler whose MLP is 4 times its width"),
    _Requirement(lambda _, kind: kind == _CLIP, lambda m, kind: f"An encoder of type {kind}",
                 "has CLIP's: a class token, a norm before the first layer, no bias of patches",
                 f"{_INSTEAD} For Idefics, train with model.vision.encoder.kind=folder and a CLIP vision folder."),
)  # fmt: skip
_STILLS = _Requirement(
    lambda m, _: config_of(m).resampler.max_frames == 1,
    lambda m, _: f"model.vision.resampler.max_frames={config_of(m).resampler.max_frames}",
    "has no time embeddings of frames",
    f"Export it for still images alone, with --without-clips: their logits need no time embeddings. Or: {_INSTEAD}",
)


def to_idefics(
    checkpoint: Path, out: Path, *, dtype: str = "bf16", max_shard_bytes: int = 5 * 10**9,
    tokenizer: Path | None = None, licence: str = "apache-2.0", base: Path | None = None, encoder: Path | None = None,
    without_clips: bool = False, dry_run: bool = False,
) -> Answer:  # fmt: skip
    """Exports a checkpoint of a dense vision model.

    Args:
        base: where the base of adapters is, if it was moved.
        encoder: where its image encoder's folder is, if it was moved.
        without_clips: leaves the time embeddings of frames out.
        dry_run: writes nothing, only answers.
    Raises: ConversionError when Idefics cannot be this model, or `out` exists or cannot be written; CheckpointError.
    """
    if not dry_run:
        refuse_existing(out)
    source = open_checkpoint(checkpoint, base)
    vision = vision_of_checkpoint(source, encoder)
    if vision is None:
        raise ConversionError(f"{source.folder} is a text model: Idefics sees images.", "Convert with to-hf.")
    require_idefics(vision.weights.model, vision.encoder.config["model_type"], without_clips=without_clips)
    files, special = tokenizer_files(source.folder, source.manifest, source.run, tokenizer)
    files[PROCESSOR] = _processor(vision.encoder)
    export = Export(
        source=source, config=to_config(vision.weights.model, vision.encoder, DTYPES[dtype][1]) | special,
        tensors=_tensors(source, vision), dtype=dtype, max_shard_bytes=max_shard_bytes, files=files, licence=licence,
        notes=_notes(vision.weights.model) + vision.encoder.notes(), origin=json.dumps(vision.encoder.identity),
    )  # fmt: skip
    if not dry_run:
        export.write(out)
    return export.answer(out)


def require_idefics(model: ModelConfig, encoder: str, *, without_clips: bool) -> None:
    """Raises: ConversionError naming what Idefics cannot be.

    Args:
        encoder: model_type of its config.json.
    """
    for requirement in (*REQUIREMENTS, *(() if without_clips else (_STILLS,))):
        if not requirement.is_met(model, encoder):
            raise ConversionError(
                f"{requirement.setting(model, encoder)}: Idefics {requirement.has_instead}.", requirement.cure
            )


def _tensors(source: CheckpointWeights, vision: Vision) -> list[NewTensor]:
    text = list(links(LLAMA, source.shapes, source.model))
    require_whole(text, source.shapes)
    weights = vision.weights
    shapes = {name: shape for name, shape in weights.shapes.items() if name != TIME_EMBEDDINGS}
    seen = list(vision_links(shapes, weights.model))
    require_whole(seen, shapes)
    return [
        *(new_tensor(link, source) for link in text),
        *(new_tensor(link, weights, "model.") for link in seen),
        *vision.encoder.tensors("model.vision_model."),
    ]


def to_config(model: ModelConfig, encoder: Encoder, dtype: str) -> Json:
    """config.json, without special tokens."""
    vision, clip = config_of(model), encoder.config
    resampler = vision.resampler
    return {
        "architectures": ["IdeficsForVisionText2Text"], "model_type": "idefics", "vocab_size": model.vocab_size,
        "additional_vocab_size": 0, "hidden_size": model.hidden_size, "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers, "num_attention_heads": model.num_attention_heads, "dropout": 0.0,
        "hidden_act": "silu", "initializer_range": model.init_std, "alpha_initializer": "zeros",
        "alphas_initializer_range": 0.0, "alpha_type": "float", "rms_norm_eps": model.norm_epsilon, "use_cache": True,
        "tie_word_embeddings": model.tied_embeddings, "cross_layer_interval": vision.cross_attention_every,
        "qk_layer_norms": False, "freeze_text_layers": False, "freeze_vision_layers": False, "use_resampler": True,
        "max_position_embeddings": model.seq_length,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "vision_config": {
            "model_type": "idefics_vision", "embed_dim": clip["hidden_size"], "image_size": clip["image_size"],
            "intermediate_size": clip["intermediate_size"], "patch_size": clip["patch_size"],
            "num_hidden_layers": clip["num_hidden_layers"], "num_attention_heads": clip["num_attention_heads"],
            "num_channels": clip.get("num_channels", 3), "hidden_act": encoder.forward_settings["hidden_act"],
            "layer_norm_eps": encoder.forward_settings["layer_norm_eps"], "attention_dropout": 0.0,
        },
        "perceiver_config": {
            "model_type": "idefics_perciever", "use_resampler": True, "resampler_n_latents": resampler.num_latents,
            "resampler_depth": resampler.num_layers, "resampler_n_heads": resampler.num_attention_heads,
            "resampler_head_dim": vision.width // resampler.num_attention_heads, "qk_layer_norms_perceiver": False,
        },
        "dtype": dtype, "torch_dtype": dtype,
    }  # fmt: skip


def _processor(encoder: Encoder) -> bytes:
    """preprocessor_config.json: pictures are resized whole to the square, as in training."""
    settings = {
        "image_processor_type": "IdeficsImageProcessor", "image_size": encoder.config["image_size"],
        "image_num_channels": 3, "image_mean": list(encoder.mean), "image_std": list(encoder.deviation), "resample": 3,
    }  # fmt: skip
    return (json.dumps(settings, indent=2) + "\n").encode()


def _notes(model: ModelConfig) -> list[str]:
    notes = ["A token looks at one image, the latest at or before it: image_attention_mask has one 1 a row, or none."]
    if config_of(model).resampler.max_frames > 1:
        notes.append("Exported without the time embeddings of frames: for still images.")
    return notes

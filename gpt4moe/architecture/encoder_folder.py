"""A folder with an image encoder of transformers, checked by its config.json before anything is loaded. No torch."""

import json
from pathlib import Path
from typing import Any

from gpt4moe.config.vision import EncoderConfig, EncoderKind
from gpt4moe.errors import ConfigError

KINDS = ("siglip_vision_model", "clip_vision_model")
"""model_type of config.json."""
_SIZES = {
    "image_size": "image_size", "patch_size": "patch_size", "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers", "num_attention_heads": "num_attention_heads",
    "ffn_hidden_size": "intermediate_size",
}  # fmt: skip
"""Key of model.vision.encoder -> of config.json."""


def model_type(folder: Path) -> str:
    """Raises: ConfigError, as require_encoder."""
    found = _config(folder).get("model_type")
    if found not in KINDS:
        raise ConfigError(
            f"model.vision.encoder.folder={folder} has a model of type {found}, not one of {', '.join(KINDS)}.",
            "Save the vision part alone: SiglipVisionModel.from_pretrained(NAME).save_pretrained(FOLDER).",
        )
    return str(found)


def require_encoder(config: EncoderConfig) -> None:
    """Raises: ConfigError when the folder is gone, or of another kind or size than model.vision.encoder."""
    if config.kind is not EncoderKind.folder:
        return
    folder = Path(config.folder or "")
    model_type(folder)
    stored = _config(folder)
    for ours, theirs in _SIZES.items():
        if theirs in stored and stored[theirs] != getattr(config, ours):
            raise ConfigError(
                f"model.vision.encoder.{ours}={getattr(config, ours)}, but {theirs} of {folder} is {stored[theirs]}.",
                f"Set model.vision.encoder.{ours}={stored[theirs]}, or give another folder.",
            )


def _config(folder: Path) -> dict[str, Any]:
    try:
        loaded = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        loaded = None
    if not isinstance(loaded, dict):
        raise ConfigError(
            f"model.vision.encoder.folder={folder} has no config.json that can be read.",
            "Give a folder that transformers wrote (save_pretrained).",
        )
    return loaded

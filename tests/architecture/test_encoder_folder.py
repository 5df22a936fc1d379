"""An encoder's folder is refused by its config.json, before anything is loaded."""

import json
from pathlib import Path

import pytest

from gpt4moe.architecture.encoder_folder import require_encoder
from gpt4moe.config.vision import EncoderConfig, EncoderKind
from gpt4moe.errors import ConfigError

STORED = {
    "model_type": "siglip_vision_model", "image_size": 32, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 1,
    "num_attention_heads": 2, "intermediate_size": 24,
}  # fmt: skip


def config(folder: Path, **changed: int) -> EncoderConfig:
    sizes = {
        "image_size": 32, "patch_size": 8, "hidden_size": 16, "num_layers": 1, "num_attention_heads": 2,
        "ffn_hidden_size": 24,
    }  # fmt: skip
    return EncoderConfig(kind=EncoderKind.folder, folder=str(folder), **(sizes | changed))


@pytest.mark.parametrize(
    ("stored", "changed", "cause"),
    [
        (STORED | {"model_type": "llama"}, {}, "type llama"),
        (STORED, {"hidden_size": 32}, "hidden_size=32, but hidden_size of .* is 16"),
        (STORED, {"num_layers": 2}, "num_layers=2, but num_hidden_layers of .* is 1"),
        (None, {}, "no config.json"),
    ],
)
def test_a_folder_of_another_kind_or_size_is_refused(
    stored: dict[str, object] | None, changed: dict[str, int], cause: str, tmp_path: Path
) -> None:
    if stored is not None:
        (tmp_path / "config.json").write_text(json.dumps(stored))
    with pytest.raises(ConfigError, match=cause):
        require_encoder(config(tmp_path, **changed))


def test_a_fitting_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(STORED))
    require_encoder(config(tmp_path))

"""An encoder's folder is refused by its files, before anything is loaded."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from gpt4moe.architecture.encoder_folder import KINDS, encoder_identity, pixel_statistics, require_encoder
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


def saved(folder: Path) -> Path:
    (folder / "config.json").write_text(json.dumps(STORED))
    save_file({"weight": np.zeros((2, 3), dtype=np.float32)}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("stored", "changed", "cause"),
    [
        (STORED | {"model_type": "llama"}, {}, "type llama"),
        (STORED, {"hidden_size": 32}, "hidden_size=32, but hidden_size of .* is 16"),
        (STORED, {"num_layers": 2}, "num_layers=2, but num_hidden_layers of .* is 1"),
        ({key: value for key, value in STORED.items() if key != "patch_size"}, {}, "config.json has no patch_size"),
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
    require_encoder(config(saved(tmp_path)))


def _cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])


def _pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _lost_shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    names = {"weight": "model-00001-of-00002.safetensors", "more": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def _processor(text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "preprocessor_config.json").write_text(text)

    return write


@pytest.mark.parametrize(
    ("harm", "cause"),
    [
        (_cut, "model.safetensors is missing, truncated or no safetensors file"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"garbage, no header"), "no safetensors file"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no model.safetensors"),
        (_pickle, "has no model.safetensors, only pytorch_model.bin: such files can run code"),
        (_lost_shard, "model-00002-of-00002.safetensors is missing"),
        (_processor("{"), "has no preprocessor_config.json that can be read"),
        (_processor('{"image_mean": [0.5, 0.5]}'), "image_mean or image_std .* is not three numbers"),
        (_processor('{"image_std": [0.5, 0.5, 0]}'), "a deviation is not above 0"),
    ],
)
def test_a_folder_with_a_damaged_file_or_no_weights_is_refused_with_a_cure(
    harm: Callable[[Path], None], cause: str, tmp_path: Path
) -> None:
    harm(saved(tmp_path))
    with pytest.raises(ConfigError, match=cause) as refused:
        require_encoder(config(tmp_path))
    assert "save_pretrained(FOLDER), and AutoImageProcessor" in refused.value.cure


def test_pixels_are_normalised_as_the_kind_s_own_processor_does_where_the_folder_has_none(tmp_path: Path) -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    published = {"clip_vision_model": CLIPImageProcessorPil(), "siglip_vision_model": SiglipImageProcessorPil()}
    for kind in KINDS:
        (tmp_path / "config.json").write_text(json.dumps(STORED | {"model_type": kind}))
        assert pixel_statistics(tmp_path) == (tuple(published[kind].image_mean), tuple(published[kind].image_std))


@pytest.mark.parametrize(
    "said",
    [
        {"do_normalize": False}, {"do_rescale": False}, {"rescale_factor": 1 / 127.5},
        {"do_rescale": False, "do_normalize": False, "rescale_factor": 3}, {"rescale_factor": 0.00392156862745098},
    ],
    ids=str,
)  # fmt: skip
def test_pixels_are_what_the_folder_s_processor_makes_of_them(said: dict[str, float], tmp_path: Path) -> None:
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    statistics = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
    processor = SiglipImageProcessorPil(**(statistics | said), do_resize=False)
    processor.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(STORED))
    pixels = np.arange(2 * 2 * 3, dtype=np.uint8).reshape(2, 2, 3) * 20
    mean, deviation = (np.array(one) for one in pixel_statistics(tmp_path))
    theirs = processor(pixels, return_tensors="np", input_data_format="channels_last")["pixel_values"][0]
    np.testing.assert_allclose(np.moveaxis((pixels / 255 - mean) / deviation, -1, 0), theirs, rtol=1e-5)  # fp32


def test_a_rescale_factor_that_is_none_is_refused(tmp_path: Path) -> None:
    (saved(tmp_path) / "preprocessor_config.json").write_text('{"rescale_factor": 0}')
    with pytest.raises(ConfigError, match="rescale_factor=0"):
        require_encoder(config(tmp_path))


def _said(folder: Path) -> dict[str, Any]:
    return encoder_identity(folder, lambda done, total: None)


def test_the_identity_is_what_features_depend_on(tmp_path: Path) -> None:
    first = _said(saved(tmp_path))
    assert first["weights"] == hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    (tmp_path / "config.json").write_text(json.dumps(STORED | {"transformers_version": "9"}))
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5], "do_resize": true}')
    assert _said(tmp_path) == first
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.4]}')
    assert (
        _said(tmp_path)["settings"]["image_mean"] == [0.5, 0.5, 0.4] and _said(tmp_path)["weights"] == first["weights"]
    )
    (tmp_path / "config.json").write_text(json.dumps(STORED | {"layer_norm_eps": 1e-5}))
    assert _said(tmp_path)["settings"]["layer_norm_eps"] == 1e-5
    save_file({"weight": np.ones((2, 3), dtype=np.float32)}, tmp_path / "model.safetensors")
    assert _said(tmp_path)["weights"] != first["weights"]


def test_the_identity_of_several_files_has_the_names_and_bytes_of_all(tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "a.safetensors")
    save_file({"other": np.zeros(2, dtype=np.float32)}, tmp_path / "b.safetensors")
    index = {"weight_map": {"weight": "a.safetensors", "other": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    seen: list[tuple[int, int]] = []
    first = encoder_identity(tmp_path, lambda done, total: seen.append((done, total)))["weights"]
    total = sum((tmp_path / f"{name}.safetensors").stat().st_size for name in "ab")
    assert seen[-1] == (total, total)
    save_file({"other": np.ones(2, dtype=np.float32)}, tmp_path / "b.safetensors")
    assert _said(tmp_path)["weights"] != first

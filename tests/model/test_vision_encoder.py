"""The frozen encoder: fresh weights follow from the seed; a folder of transformers gives transformers' features."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, CLIPVisionModel

from gpt4moe.config.vision import EncoderConfig, EncoderKind
from gpt4moe.errors import ConfigError
from gpt4moe.model.vision_encoder import FrozenEncoder

SIZES = {
    "image_size": 16, "patch_size": 8, "hidden_size": 16, "num_layers": 1, "num_attention_heads": 2,
    "ffn_hidden_size": 24,
}  # fmt: skip
CPU = torch.device("cpu")


def test_fresh_weights_follow_from_the_seed() -> None:
    pixels = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    made = [FrozenEncoder(EncoderConfig(**SIZES), seed, CPU, torch.float32).features(pixels) for seed in (1, 1, 2)]
    assert made[0].shape == (3, 4, 16)
    assert torch.equal(made[0], made[1])
    assert (made[0] - made[2]).abs().mean() > 0.1
    assert (made[0][0] - made[0][1]).abs().mean() > 0.05, "other pixels, other features"


def test_fresh_weights_are_the_same_with_every_version_of_transformers() -> None:
    """A run's checkpoints hold the seed alone. A change of names, or of which tensors there are, shows here."""
    model = FrozenEncoder(EncoderConfig(**SIZES), 1, CPU, torch.float32).model
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(name.removeprefix("vision_model.").encode() + parameter.numpy().tobytes())
    assert digest.hexdigest() == "a43fa39d9378cef51febe0620fb3027422e162083682bfef5927c5c69ac58c55"


def test_a_folder_gives_the_features_that_transformers_gives(tmp_path: Path) -> None:
    torch.manual_seed(0)
    clip = CLIPVisionModel(
        CLIPVisionConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
                         image_size=16, patch_size=8)
    ).eval()  # fmt: skip
    clip.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}')
    encoder = FrozenEncoder(
        EncoderConfig(kind=EncoderKind.folder, folder=str(tmp_path), **SIZES), 0, CPU, torch.float32
    )
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    mean, deviation = (torch.tensor(x).view(3, 1, 1) for x in ([0.4, 0.5, 0.6], [0.2, 0.3, 0.4]))
    with torch.no_grad():
        want = clip(pixel_values=(pixels.float() / 255 - mean) / deviation).last_hidden_state
    assert encoder.features(pixels).detach().numpy() == pytest.approx(want.numpy(), abs=1e-6)
    assert not any(parameter.requires_grad for parameter in encoder.model.parameters())


@pytest.mark.parametrize("harm", ["missing", "of another shape"])
def test_a_folder_that_lacks_weights_is_refused_by_their_names(harm: str, tmp_path: Path) -> None:
    CLIPVisionModel(
        CLIPVisionConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
                         image_size=16, patch_size=8)
    ).save_pretrained(tmp_path)  # fmt: skip
    path = tmp_path / "model.safetensors"
    stored = load_file(path)
    name = next(name for name in stored if name.endswith("q_proj.bias"))
    stored.pop(name)
    save_file(stored if harm == "missing" else stored | {name: torch.zeros(3)}, path, metadata={"format": "pt"})
    config = EncoderConfig(kind=EncoderKind.folder, folder=str(tmp_path), **SIZES)
    with pytest.raises(ConfigError, match=r"for 1 tensors: .*q_proj\.bias"):
        FrozenEncoder(config, 0, CPU, torch.float32)

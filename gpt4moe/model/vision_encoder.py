"""The encoder of a vision model: a frozen SigLIP or CLIP vision transformer of transformers.

    pixels [P, 3, side, side] uint8 -> normalised -> [P, patches, D]

It is no part of the model's tensors: it has no gradients and no place in checkpoints. Fresh weights are a function of
the seed and of each tensor's name, so every rank and every launch has the same, whatever order or initial values
transformers has. Its folder is checked by architecture.encoder_folder, before; its files are part of a run's identity
(training.encoder_files).
"""

from math import sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gpt4moe.architecture.encoder_folder import KINDS, SAVE_AGAIN, Channels, model_type, pixel_statistics
from gpt4moe.config.vision import EncoderConfig, EncoderKind
from gpt4moe.errors import ConfigError
from gpt4moe.parallel.rng import normal_box

_SHOWN = 3


class FrozenEncoder:
    """Owns the encoder's weights on one device. Raises: ConfigError for a folder that lacks weights."""

    def __init__(self, config: EncoderConfig, seed: int, device: torch.device, dtype: torch.dtype):
        model = (
            _from_folder(Path(config.folder or ""))
            if config.kind is EncoderKind.folder
            else _fresh(config, seed, device)
        )
        self.model = model.to(device=device, dtype=dtype).eval().requires_grad_(False)
        mean, deviation = _pixels(config)
        self.mean = torch.tensor(mean, device=device).view(3, 1, 1)
        self.deviation = torch.tensor(deviation, device=device).view(3, 1, 1)
        self.dtype = dtype

    @torch.no_grad()
    def features(self, pixels: Tensor) -> Tensor:
        """pixels [P, 3, side, side] uint8 -> [P, patches, D]"""
        # Not named before it is cast: in bf16 the fp32 pixels would stay until the end.
        normalised = ((pixels.float() / 255 - self.mean) / self.deviation).to(self.dtype)
        return self.model(pixel_values=normalised).last_hidden_state


def _from_folder(folder: Path) -> Any:
    from transformers import CLIPVisionModel, SiglipVisionModel

    made = {"siglip_vision_model": SiglipVisionModel, "clip_vision_model": CLIPVisionModel}[model_type(folder)]
    model, report = made.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True
    )
    # transformers gives both random values, and says so in a warning alone.
    lost = sorted({*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])})
    if lost:
        raise ConfigError(
            f"model.vision.encoder.folder={folder} has no weights, or some of another shape, for {len(lost)} tensors: "
            f"{', '.join(lost[:_SHOWN])}{', ...' * (len(lost) > _SHOWN)}.",
            SAVE_AGAIN,
        )
    return model


def _fresh(config: EncoderConfig, seed: int, device: torch.device) -> Any:
    from transformers import SiglipVisionConfig, SiglipVisionModel
    from transformers.initialization import no_init_weights

    with device, no_init_weights():  # all are filled below
        model: nn.Module = SiglipVisionModel(
            SiglipVisionConfig(
                hidden_size=config.hidden_size, intermediate_size=config.ffn_hidden_size,
                num_hidden_layers=config.num_layers, num_attention_heads=config.num_attention_heads,
                image_size=config.image_size, patch_size=config.patch_size, vision_use_head=False,
                hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6,
            )
        )  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(float(name.endswith("weight")))  # norms; biases are 0
                continue
            shape = (parameter.shape[0], parameter[0].numel())
            # transformers 4 names what its vision model has `vision_model.*`, 5 does not.
            box = normal_box(seed, f"encoder {name.removeprefix('vision_model.')}", shape, (0, 0), shape)
            parameter.copy_((box / sqrt(shape[1])).view(parameter.shape))
    return model


def _pixels(config: EncoderConfig) -> tuple[Channels, Channels]:
    """Mean and deviation that pixels are normalised by."""
    if config.kind is EncoderKind.fresh:
        return KINDS["siglip_vision_model"]
    return pixel_statistics(Path(config.folder or ""))

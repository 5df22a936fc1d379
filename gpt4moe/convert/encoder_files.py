"""The image encoder of a vision model as files of transformers: copied from its folder, or drawn where it is fresh.

    encoder/config.json, model.safetensors (or several, with their index), preprocessor_config.json

Only a fresh encoder needs torch, which draws its weights from run.seed.
"""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gpt4moe.architecture.encoder_folder import (
    SAVE_AGAIN,
    Channels,
    model_type,
    pixel_statistics,
    require_encoder,
    require_same_encoder,
)
from gpt4moe.architecture.rows import Shape
from gpt4moe.architecture.tensors import Box
from gpt4moe.config.vision import EncoderConfig, EncoderKind
from gpt4moe.convert.copy_pipeline import CHUNK_ELEMENTS
from gpt4moe.convert.safetensors_file import INDEX, NewTensor, RawFile
from gpt4moe.errors import ConfigError, ConversionError

PROCESSOR = "preprocessor_config.json"
_PREFIX = "vision_model."
"""Of names in folders that transformers before version 5 saved."""
_IGNORED = ("position_ids",)
"""In old folders: 0, 1, 2, ..., as integers."""
_DEFAULTS = {"siglip_vision_model": ("gelu_pytorch_tanh", 1e-6), "clip_vision_model": ("quick_gelu", 1e-5)}
"""model_type -> hidden_act and layer_norm_eps of transformers, where config.json has none."""
_OF_LAYER = (
    "layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
    "self_attn.out_proj",
)  # fmt: skip
_HEAD = {"head.probe", "head.attention.in_proj_weight", "head.attention.in_proj_bias"} | {
    f"head.{name}.{kind}"
    for name in ("attention.out_proj", "layernorm", "mlp.fc1", "mlp.fc2")
    for kind in ("weight", "bias")
}
"""Of a SigLIP encoder with vision_use_head: it pools features, which no model here asks for."""


@dataclass(frozen=True, slots=True)
class Encoder:
    """An encoder's settings and weights, wherever they lie."""

    config: dict[str, Any]
    """config.json of transformers."""
    mean: Channels
    deviation: Channels
    folder: Path | None
    """None: a fresh one."""
    drawn: dict[str, np.ndarray]
    """Of a fresh one: its weights, fp32."""
    identity: dict[str, Any] | None = None
    """Of a run's folder: encoder_identity."""
    is_known: bool = True
    """Whether these are the files that the run was trained with; False: it says nothing of them."""

    @property
    def dtype(self) -> str:
        """Of safetensors."""
        stored = {} if self.folder is None else self._stored()
        dtypes = {file.tensors[name].dtype for file, name in stored.values()}
        return "BF16" if dtypes == {"BF16"} else "F32"

    @property
    def forward_settings(self) -> dict[str, Any]:
        """Settings that change features but no tensor's shape."""
        act, epsilon = _DEFAULTS[self.config["model_type"]]
        return {
            "hidden_act": self.config.get("hidden_act", act),
            "layer_norm_eps": self.config.get("layer_norm_eps", epsilon),
            "num_attention_heads": self.config["num_attention_heads"],
        }

    @property
    def is_copied(self) -> bool:
        """Whether an export has the files of its folder, and not weights that are written anew: of a fresh one, or of
        one whose files have more than its weights."""
        return self.folder is not None and not self.left_out

    @property
    def left_out(self) -> list[str]:
        """Names of tensors in its folder that are none of it: the projection of a CLIPVisionModelWithProjection."""
        return [] if self.folder is None else sorted(self._all_stored().keys() - encoder_names(self.config))

    def notes(self) -> list[str]:
        """What an export says of it."""
        notes = []
        if not self.is_known:
            notes.append(f"The run does not say which encoder it was trained with: that of {self.folder} was taken.")
        if self.left_out:
            notes.append(f"Left out of the encoder, as no feature needs it: {', '.join(self.left_out)}.")
        return notes

    @property
    def shapes(self) -> dict[str, Shape]:
        """Name of transformers (without the `vision_model.` of older folders) -> shape."""
        return {tensor.key: tensor.shape for tensor in self.tensors()}

    def tensors(self, prefix: str = "") -> list[NewTensor]:
        """All its weights, named with `prefix`, as a file takes them."""
        if self.folder is None:
            return [NewTensor.of_array(prefix + name, self.drawn[name]) for name in sorted(self.drawn)]
        return [NewTensor.of_file(prefix + name, *place) for name, place in sorted(self._stored().items())]

    def values(self, name: str, boxes: list[Box]) -> Iterator[np.ndarray]:
        """As Weights.values; of whole tensors alone."""
        (tensor,) = (tensor for tensor in self.tensors() if tensor.key == name)
        return tensor.values(lambda: np.empty(CHUNK_ELEMENTS, dtype=np.float32))

    def files(self) -> list[Path]:
        """Of its folder: what an export copies."""
        assert self.folder is not None
        index = [self.folder / INDEX] if (self.folder / INDEX).is_file() else []
        return [self.folder / "config.json", *weight_files(self.folder), *index]

    def preprocessor(self) -> dict[str, Any]:
        """preprocessor_config.json: what training did with pictures. That of the folder may crop them."""
        side = self.config["image_size"]
        return {
            "image_processor_type": "SiglipImageProcessor" if "siglip" in self.config["model_type"] else
            "CLIPImageProcessor", "do_resize": True, "size": {"height": side, "width": side}, "resample": 3,
            "do_center_crop": False, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
            "image_mean": list(self.mean), "image_std": list(self.deviation), "do_convert_rgb": True,
        }  # fmt: skip

    def _stored(self) -> dict[str, tuple[RawFile, str]]:
        names = encoder_names(self.config)
        return {name: place for name, place in self._all_stored().items() if name in names}

    def _all_stored(self) -> dict[str, tuple[RawFile, str]]:
        assert self.folder is not None
        files = [RawFile(path, _IGNORED) for path in weight_files(self.folder)]
        return {name.removeprefix(_PREFIX): (file, name) for file in files for name in file.tensors}


def open_encoder(config: EncoderConfig, seed: int, known: dict[str, Any] | None, moved: Path | None = None) -> Encoder:
    """The encoder that a run was trained with. Draws a fresh one.

    Args:
        known: encoder_identity of the run's folder; None: it says none (runs begun before 2026-11-30).
        moved: where its folder is now.
    Raises: ConversionError when the folder is gone, damaged, of another kind or size, or has another encoder.
    """
    if config.kind is EncoderKind.fresh:
        if moved is not None:
            raise ConversionError(
                f"--encoder {moved}: this model's encoder is a fresh one, drawn from run.seed.", "Leave --encoder out."
            )
        return _fresh(config, seed)
    folder = Path(config.folder or "") if moved is None else moved
    try:
        require_encoder(dataclasses.replace(config, folder=str(folder)))
        found = require_same_encoder(folder, known)
    except ConfigError as error:
        cure = "Say where the encoder's folder is with --encoder." if not folder.is_dir() else error.cure
        raise ConversionError(error.cause, cure) from error
    return dataclasses.replace(encoder_in(folder), identity=found, is_known=known is not None)


def encoder_in(folder: Path) -> Encoder:
    """Raises: ConversionError when it is no folder of an encoder, or damaged."""
    try:
        model_type(folder)
        mean, deviation = pixel_statistics(folder)
    except ConfigError as error:
        raise ConversionError(error.cause, error.cure) from error
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    encoder = Encoder(config, mean, deviation, folder, {})
    missing = sorted(encoder_names(config) - encoder.shapes.keys())
    if missing:
        raise ConversionError(
            f"{folder} has no weights for {len(missing)} tensors of its encoder, e.g. {missing[0]}.", SAVE_AGAIN
        )
    return encoder


def encoder_names(config: dict[str, Any]) -> set[str]:
    """Names of an encoder's weights (without `vision_model.`), as transformers has them.

    Args:
        config: config.json.
    """
    is_clip = config["model_type"] == "clip_vision_model"
    norms = ["post_layernorm"] + ["pre_layrnorm"] * is_clip
    in_layers = [f"encoder.layers.{layer}.{name}" for layer in range(config["num_hidden_layers"]) for name in _OF_LAYER]
    names = {f"{name}.{kind}" for name in (*norms, *in_layers) for kind in ("weight", "bias")}
    names |= {"embeddings.patch_embedding.weight", "embeddings.position_embedding.weight"}
    names |= {"embeddings.class_embedding" if is_clip else "embeddings.patch_embedding.bias"}
    return names if is_clip or not config.get("vision_use_head", True) else names | _HEAD


def weight_files(folder: Path) -> list[Path]:
    """Its safetensors files. Raises: ConversionError when it has none, or lacks one that its index names."""
    names = ["model.safetensors"]
    if (folder / INDEX).is_file() and not (folder / names[0]).is_file():
        names = sorted({Path(n).name for n in json.loads((folder / INDEX).read_text())["weight_map"].values()})
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ConversionError(f"{folder} lacks {missing[0]}.", "Copy or download the folder again, in safetensors.")
    return [folder / name for name in names]


def _fresh(config: EncoderConfig, seed: int) -> Encoder:
    import torch

    from gpt4moe.model.vision_encoder import FrozenEncoder

    made = FrozenEncoder(config, seed, torch.device("cpu"), torch.float32)
    drawn = {name: tensor.contiguous().numpy() for name, tensor in made.model.state_dict().items()}
    mean, deviation = ((x[0], x[1], x[2]) for x in (made.mean.flatten().tolist(), made.deviation.flatten().tolist()))
    settings: dict[str, Any] = json.loads(made.model.config.to_json_string(use_diff=False))
    settings |= {"architectures": [type(made.model).__name__], "dtype": "float32"}
    return Encoder(settings, mean, deviation, None, drawn)

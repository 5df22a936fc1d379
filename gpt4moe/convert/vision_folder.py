"""The folder vision/ of an export: resampler, gated blocks and encoder of a vision model, beside its text model.

    vision/config.json          sizes, layers of the gated blocks, image token, how pictures become pixels
    vision/model.safetensors    weights, by the names of vision_tables.py
    vision/encoder/             the encoder, a folder of transformers (SigLIP or CLIP vision)
    vision/SHA256SUMS           of all these files, for `sha256sum -c` and for verify

examples/load_vision.py reads it without gpt4moe. No torch, but to draw a fresh encoder.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from gpt4moe.architecture.rows import Shape
from gpt4moe.checkpoint.storage import StoredPiece
from gpt4moe.config.checksums import SUMS, changed_files, read_sums
from gpt4moe.config.load import config_from_dict
from gpt4moe.config.model import ModelConfig
from gpt4moe.config.vision import EncoderConfig, EncoderKind, ResamplerConfig, VisionConfig
from gpt4moe.convert.encoder_files import Encoder, encoder_in, open_encoder
from gpt4moe.convert.folder_tensors import place, stored_tensors
from gpt4moe.convert.vision_tables import config_of, vision_links, vision_shapes
from gpt4moe.convert.weights import CheckpointWeights, FolderWeights, Weights
from gpt4moe.errors import ConfigError, ConversionError
from gpt4moe.parallel.shard import WEIGHT

FOLDER = "vision"
_FORMAT = 1
ENCODER = "encoder"
_AGAIN = "Copy the folder again, or export it again with to-hf."

Json = dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Vision:
    """The vision parts of a checkpoint or of an export."""

    weights: Weights
    """Resampler and gated blocks; `weights.model` is the whole model."""
    encoder: Encoder

    def settings(self) -> Json:
        """vision/config.json, without the image token."""
        model, encoder = self.weights.model, self.encoder
        vision = config_of(model)
        resampler = vision.resampler
        return {
            "format": _FORMAT,
            "layers": [layer for layer in range(model.num_layers) if model.has_gated_block(layer)],
            "cross_attention_every": vision.cross_attention_every,
            "hidden_size": model.hidden_size, "num_attention_heads": model.num_attention_heads,
            "head_dim": model.head_size, "intermediate_size": vision.ffn_hidden_size,
            "rms_norm_eps": model.norm_epsilon,
            "resampler": {
                "num_layers": resampler.num_layers, "num_latents": resampler.num_latents,
                "num_attention_heads": resampler.num_attention_heads, "hidden_size": vision.width,
                "intermediate_size": vision.resampler_ffn, "max_frames": resampler.max_frames, "layer_norm_eps": 1e-5,
            },
            "encoder": {"folder": ENCODER, "model_type": encoder.config["model_type"]},
            "preprocessing": {
                "image_size": vision.encoder.image_size, "resample": "bicubic", "background": "white",
                "mean": list(encoder.mean), "std": list(encoder.deviation),
            },
        }  # fmt: skip

    def forward_settings(self) -> Json:
        """Settings that change logits but no tensor's shape, for verify."""
        return _flat(self.settings() | {"encoder": self.encoder.forward_settings}, "vision")


class CheckpointVision(Weights):
    """Resampler and gated blocks of a checkpoint of ours, beside its text model.

    Raises: ConversionError when it lacks one, or has one of another shape.
    """

    def __init__(self, source: CheckpointWeights, model: ModelConfig):
        super().__init__(source.folder, model, "F32", vision_shapes(model))
        self.source = source
        for name, shape in self.shapes.items():
            key = f"{WEIGHT}/{name}"
            if source.index.shapes.get(key) != shape:
                raise ConversionError(
                    f"{self.folder} has no {name} of shape {list(shape)}, which its model has.",
                    "Take another copy: this one is damaged.",
                )
            self.pieces[name] = source.index.pieces[key]

    def read_run(self, piece: StoredPiece, at: Shape, size: Shape) -> np.ndarray:
        return self.source.read_run(piece, at, size)


def has_vision(weights: Weights) -> bool:
    """Whether vision parts belong to a text model's weights: in its checkpoint, or beside it in an export."""
    if isinstance(weights, CheckpointWeights):
        return config_from_dict(weights.manifest.config).model.vision is not None
    return (weights.folder / FOLDER).is_dir()


def vision_names(weights: Weights) -> list[str]:
    """Names of those vision parts but the encoder's. Raises: ConversionError, as vision_in."""
    if isinstance(weights, CheckpointWeights):
        return sorted(vision_shapes(config_from_dict(weights.manifest.config).model))
    return sorted(vision_of(weights).weights.shapes)


def encoder_folder(weights: Weights) -> Path | None:
    """Where a checkpoint says its encoder's folder is; None: it is a text model's, or its encoder is no folder; or the
    weights are no checkpoint's."""
    if not isinstance(weights, CheckpointWeights):
        return None
    vision = config_from_dict(weights.manifest.config).model.vision
    if vision is None or vision.encoder.kind is not EncoderKind.folder:
        return None
    return Path(vision.encoder.folder or "")


def encoder_is_known(weights: Weights) -> bool:
    """Whether a checkpoint says which files its encoder's folder had."""
    return isinstance(weights, CheckpointWeights) and weights.manifest.encoder is not None


def vision_of(weights: Weights, moved: Path | None = None) -> Vision:
    """Those vision parts. Raises: ConversionError, as vision_of_checkpoint and vision_in."""
    if isinstance(weights, CheckpointWeights):
        found = vision_of_checkpoint(weights, moved)
    else:
        found = vision_in(weights.folder, weights.model)
    assert found is not None, "has_vision says so"
    return found


def vision_of_checkpoint(source: CheckpointWeights, moved: Path | None = None) -> Vision | None:
    """None: it is a text model's.

    Args:
        moved: where its encoder's folder is now.
    Raises: ConversionError when the encoder's folder is gone or has another encoder; or a text model is given one.
    """
    run = config_from_dict(source.manifest.config)
    if run.model.vision is None:
        if moved is not None:
            raise ConversionError(f"{source.folder} is a text model: it has no encoder.", "Leave --encoder out.")
        return None
    weights = CheckpointVision(source, run.model)
    return Vision(weights, open_encoder(run.model.vision.encoder, run.run.seed, source.manifest.encoder, moved))


def vision_in(folder: Path, model: ModelConfig) -> Vision | None:
    """The vision parts beside the text model of an export; None: there are none.

    Args:
        model: the text model.
    Raises: ConversionError when a file is not what SHA256SUMS says, or does not fit the model.
    """
    place_of = folder / FOLDER
    if not place_of.is_dir():
        return None
    require_sums(place_of)
    try:
        found = json.loads((place_of / "config.json").read_text(encoding="utf-8"))
        encoder = encoder_in(place_of / ENCODER)
        whole = dataclasses.replace(model, vision=_vision_config(found, encoder))
        whole.validate()
    except (OSError, ValueError, KeyError, TypeError, ConfigError) as error:
        raise ConversionError(f"{place_of / 'config.json'} cannot be read ({error}).", _AGAIN) from error
    tensors, places, files = stored_tensors(place_of)
    dtype = next(iter(tensors.values())).dtype
    weights = FolderWeights(place_of, whole, dtype, vision_shapes(whole))
    weights.files.update(files)
    left = place(weights, vision_links(weights.shapes, whole), tensors, places)
    if left:
        raise ConversionError(f"{place_of} has {len(left)} tensors of unknown meaning, e.g. {min(left)}.", _AGAIN)
    return Vision(weights, encoder)


def _vision_config(found: Json, encoder: Encoder) -> VisionConfig:
    resampler, of = found["resampler"], encoder.config
    return VisionConfig(
        encoder=EncoderConfig(
            kind=EncoderKind.folder, folder=str(encoder.folder), image_size=of["image_size"],
            patch_size=of["patch_size"], hidden_size=of["hidden_size"], num_layers=of["num_hidden_layers"],
            num_attention_heads=of["num_attention_heads"], ffn_hidden_size=of["intermediate_size"],
        ),
        resampler=ResamplerConfig(
            num_layers=resampler["num_layers"], num_latents=resampler["num_latents"],
            num_attention_heads=resampler["num_attention_heads"], ffn_hidden_size=resampler["intermediate_size"],
            max_frames=resampler["max_frames"],
        ),
        cross_attention_every=found["cross_attention_every"], ffn_hidden_size=found["intermediate_size"],
    )  # fmt: skip


def _flat(settings: Json, under: str) -> Json:
    """`{"a": {"b": 1}}` -> `{"under.a.b": 1}`."""
    found: Json = {}
    for name, value in settings.items():
        found |= _flat(value, f"{under}.{name}") if isinstance(value, dict) else {f"{under}.{name}": value}
    return found


def require_sums(folder: Path) -> None:
    """Raises: ConversionError when a file is missing, added, or has other bytes than SHA256SUMS says."""
    known = {SUMS, *(read_sums(folder) or {})}
    if len(known) == 1:
        raise ConversionError(f"{folder / SUMS} is damaged or gone.", _AGAIN)
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    added = [f"{path} is not in {SUMS}." for path in paths if path.relative_to(folder).as_posix() not in known]
    for problem in added or changed_files(folder):
        raise ConversionError(problem, _AGAIN)

"""model.vision: Flamingo's parts beside a language model (arXiv:2204.14198).

pictures -> encoder, frozen -> resampler -> latents of an image -> gated cross-attention before every n-th layer
"""

from dataclasses import dataclass, field
from enum import Enum

from gpt4moe.config import MISSING
from gpt4moe.errors import ConfigError


class EncoderKind(str, Enum):
    """Where the encoder's weights come from."""

    fresh = "fresh"
    """A SigLIP vision transformer of the sizes below, whose weights follow from run.seed."""
    folder = "folder"
    """A SigLIP or CLIP vision model of transformers, from a local folder (config.json, model.safetensors)."""


@dataclass(kw_only=True, slots=True)
class EncoderConfig:
    """A vision transformer, frozen. It is no part of checkpoints."""

    kind: EncoderKind = EncoderKind.fresh
    folder: str | None = None
    """Of kind folder: where it is. Its sizes must be those below."""
    image_size: int = MISSING
    """Pixels of a side; pictures are square."""
    patch_size: int = MISSING
    """Pixels of a patch's side."""
    hidden_size: int = MISSING
    """Width of a patch's feature; the resampler and its latents are as wide."""
    num_layers: int = MISSING
    num_attention_heads: int = MISSING
    ffn_hidden_size: int = MISSING

    def validate(self) -> None:
        where = "model.vision.encoder"
        _positive(self, where, "image_size", "patch_size", "hidden_size", "num_layers", "num_attention_heads",
                  "ffn_hidden_size")  # fmt: skip
        if self.image_size % self.patch_size:
            raise ConfigError(
                f"{where}.patch_size={self.patch_size} does not divide image_size={self.image_size}.",
                f"Set {where}.image_size to a multiple of it.",
            )
        _divides(where, self.num_attention_heads, self.hidden_size, "hidden_size")
        if (self.kind is EncoderKind.folder) != (self.folder is not None):
            raise ConfigError(
                f"{where}.kind={self.kind.value} with {where}.folder={self.folder}.",
                f"Set {where}.kind=folder and {where}.folder=FOLDER, or kind=fresh and folder=null.",
            )


@dataclass(kw_only=True, slots=True)
class ResamplerConfig:
    """Perceiver Resampler: turns the features of an image, however many, into a fixed number of latents."""

    num_layers: int = 6
    num_latents: int = 64
    num_attention_heads: int = MISSING
    ffn_hidden_size: int | None = None
    """null: 4 times encoder.hidden_size."""
    max_frames: int = 8
    """Most frames of a clip: each has a time embedding. 1: still images only, no time embeddings. A still image has
    none either."""


@dataclass(kw_only=True, slots=True)
class VisionConfig:
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    resampler: ResamplerConfig = field(default_factory=ResamplerConfig)
    cross_attention_every: int = MISSING
    """A gated block stands before layers 0, n, 2n, ..."""
    ffn_hidden_size: int = MISSING
    """Inner width of the SwiGLU of a gated block."""

    @property
    def width(self) -> int:
        """Of a latent."""
        return self.encoder.hidden_size

    @property
    def resampler_ffn(self) -> int:
        return self.resampler.ffn_hidden_size or 4 * self.width

    def validate(self) -> None:
        self.encoder.validate()
        _positive(self, "model.vision", "cross_attention_every", "ffn_hidden_size")
        where = "model.vision.resampler"
        _positive(self.resampler, where, "num_layers", "num_latents", "num_attention_heads", "max_frames")
        if self.resampler.ffn_hidden_size is not None:
            _positive(self.resampler, where, "ffn_hidden_size")
        _divides(where, self.resampler.num_attention_heads, self.width, "encoder.hidden_size")


def _positive(config: object, where: str, *names: str) -> None:
    for name in names:
        if getattr(config, name) < 1:
            raise ConfigError(f"{where}.{name}={getattr(config, name)} is below 1.", f"Set {where}.{name}.")


def _divides(where: str, heads: int, width: int, name: str) -> None:
    if width % heads:
        raise ConfigError(
            f"{where}.num_attention_heads={heads} does not divide {name}={width}.",
            f"Set {where}.num_attention_heads to a divisor.",
        )

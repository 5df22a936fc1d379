"""Parameters and operations of what images pass: encoder, resampler, and what gated blocks do with latents. No torch.

An image is one frame: P patches of the encoder, D wide, and L latents of the resampler. A clip is not counted here.

    encoder    patches, then layers of four D x D matrices and an MLP; every patch attends to every patch; no gradient
    resampler  L latents attend to P features and to themselves; an MLP
    gated      keys and values of every latent; scores of every token of a row with all latents of the row

A product of [m, k] and [k, n] takes 2 m k n FLOP, and twice that for both gradients. Scores and their product with
values take 4 x queries x keys x width, and twice that in the backward pass. The tests count both with torch.
"""

from collections.abc import Collection
from dataclasses import dataclass

from gpt4moe.architecture.vision import RESAMPLER
from gpt4moe.config.model import ModelConfig
from gpt4moe.config.vision import EncoderConfig, VisionConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageFlops:
    """FLOP for the images of one sequence, forward and backward, over all layers."""

    encoder: float
    """Forward alone: it is frozen."""
    resampler: float
    gated: float
    """Keys and values of latents, and scores. The other products of gated blocks are tokens': architecture.flops."""

    @property
    def total(self) -> float:
        return self.encoder + self.resampler + self.gated


def num_patches(encoder: EncoderConfig) -> int:
    """P of one image."""
    return (encoder.image_size // encoder.patch_size) ** 2


def encoder_parameters(encoder: EncoderConfig) -> int:
    """Of a SigLIP encoder without its pooling head, as kind=fresh builds it. CLIP has one more position, a class
    embedding and one more norm, and no bias of the patches."""
    width, ffn = encoder.hidden_size, encoder.ffn_hidden_size
    patches = (3 * encoder.patch_size**2 + 1) * width + num_patches(encoder) * width
    layer = 4 * (width**2 + width) + 2 * width * ffn + ffn + width + 4 * width  # the last: two norms
    return patches + encoder.num_layers * layer + 2 * width


def encoder_flops(encoder: EncoderConfig) -> float:
    """Forward FLOP of one image."""
    width, patches = encoder.hidden_size, num_patches(encoder)
    matrices = 3 * encoder.patch_size**2 * width
    matrices += encoder.num_layers * (4 * width**2 + 2 * width * encoder.ffn_hidden_size)
    return 2.0 * patches * matrices + encoder.num_layers * 4.0 * patches**2 * width


def resampler_flops(vision: VisionConfig) -> float:
    """Forward FLOP of one image."""
    width, latents = vision.width, vision.resampler.num_latents
    seen = num_patches(vision.encoder) + latents
    of_latents = 2 * width**2 + 2 * width * vision.resampler_ffn  # queries and output; MLP
    products = latents * of_latents + seen * 2 * width**2  # keys and values
    return vision.resampler.num_layers * (2.0 * products + 4.0 * latents * seen * width)


def image_flops(model: ModelConfig, images: float, trained: Collection[str] | None = None) -> ImageFlops:
    """FLOP of the images of one sequence of a vision model.

    Args:
        images: of a sequence.
        trained: names of the trained tensors; None: all.
    """
    vision = model.vision
    assert vision is not None
    blocks = [layer for layer in range(model.num_layers) if model.has_gated_block(layer)]
    keys = [f"decoder.layers.{layer}.gated_cross_attention.linear_kv.weight" for layer in blocks]
    of_resampler = trained is None or any(name.startswith(RESAMPLER) for name in trained)
    heads, latents = model.num_attention_heads * model.head_size, images * vision.resampler.num_latents
    passes = sum(1 + of_resampler + (trained is None or name in trained) for name in keys)
    scores = 3 * 4.0 * model.seq_length * latents * heads * len(blocks)
    return ImageFlops(
        encoder=images * encoder_flops(vision.encoder),
        resampler=images * resampler_flops(vision) * (3 if of_resampler else 1),
        gated=2.0 * latents * 2 * heads * vision.width * passes + scores,
    )

"""What decoding keeps of each token: the one formula of the planner and of inference. No torch."""

from collections.abc import Iterable

from gpt4moe.architecture.flops import window_of
from gpt4moe.architecture.table import ATTENTION
from gpt4moe.config.model import ModelConfig


def cached_elements(model: ModelConfig, layer: int, context: int) -> int:
    """Elements of the cache of one layer (global index) for one sequence of `context` tokens, over all tp ranks.

    Keys and values of each query group. Latent attention: the latent and the keys' rotary part, which all heads share
    (arXiv:2405.04434, section 2.1.2). With an attention window: at most the window's tokens.
    """
    width = ATTENTION[model.layer_kinds[layer].attention].cached_width(model)
    return width * min(context, window_of(model, layer) or context)


def rank_cache_bytes(model: ModelConfig, layers: Iterable[int], *, num_tokens: int, tp: int, value_bytes: int) -> int:
    """Bytes of the cache of a rank that has these layers, for one sequence of `num_tokens` tokens, exactly.

    Args:
        value_bytes: of one element: 2 in bf16.
    """
    total = 0
    for layer in layers:
        # Each tensor-parallel rank has whole latents; keys and values are cut by query groups.
        parts = min(tp, ATTENTION[model.layer_kinds[layer].attention].cache_parts(model))
        total += value_bytes * cached_elements(model, layer, num_tokens) // parts
    return total


def rank_image_bytes(model: ModelConfig, layers: Iterable[int], *, tp: int, value_bytes: int) -> int:
    """Bytes that a rank with these layers keeps of one image, or clip, of a vision model: keys and values of its
    latents for each gated block. Of a text model 0."""
    if model.vision is None:
        return 0
    latents = model.vision.resampler.num_latents
    width = 2 * model.num_attention_heads * model.head_size
    return sum(value_bytes * latents * width // tp for layer in layers if model.has_gated_block(layer))

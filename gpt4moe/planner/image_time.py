"""Seconds of a step for its images, beside the pipeline schedule (training.images): nothing hides them.

    a rank's own micro-batches x (encoder forward + resampler forward and backward), all ranks of tp x pp at once
    + latents of all micro-batches to all ranks of tp x pp + sums of their gradients over pp
    + the sum of the resampler's gradients over tp x pp

Ranks of cp make the same latents each. Of M micro-batches the busiest rank makes M / (tp x pp), rounded up.
"""

from gpt4moe.architecture.flops import Gradients
from gpt4moe.architecture.image_flops import num_patches
from gpt4moe.architecture.tensors import resampler_tensors
from gpt4moe.config.vision import VisionConfig
from gpt4moe.planner.efficiency import ATTENTION_SHARE
from gpt4moe.planner.layer_time import Product, backward_seconds, link_rate, product_seconds
from gpt4moe.planner.states import GRADIENT_BYTES
from gpt4moe.planner.work import Work


def image_seconds(work: Work, micro_batches: int) -> float:
    """Seconds of one step. Args: micro_batches: of one data-parallel rank."""
    ranks = work.parallel.tp * work.parallel.pp
    return -(-micro_batches // ranks) * latents_seconds(work) + message_seconds(work, micro_batches)


def latents_seconds(work: Work) -> float:
    """Seconds that one rank takes for the images of one micro-batch, forward and, of the resampler, backward."""
    vision = work.model.vision
    assert vision is not None
    images = work.micro_batch_size * work.images
    encoder = sum(product_seconds(work, product) for product in encoder_products(vision, images))
    resampler = resampler_products(vision, images)
    seconds = encoder + sum(product_seconds(work, product) for product in resampler)
    encoder_scores, resampler_scores = _score_flops(vision, images)
    passes = 0.0
    if work.trains_resampler:
        seconds += sum(backward_seconds(work, product) for product in resampler)
        passes = 2.5  # flash attention computes scores again
    peak = min(work.matrix_peak, work.cluster.peak_flops_bf16) * ATTENTION_SHARE
    moved = _elementwise(vision, images, passes=1 + 2 * (passes > 0)) * work.value_bytes / work.memory_rate
    return seconds + (encoder_scores + (1 + passes) * resampler_scores) / peak + moved


def message_seconds(work: Work, micro_batches: int) -> float:
    """Seconds of the collectives of a step: rings over the slowest link. Args: micro_batches: as of image_seconds."""
    vision, parallel = work.model.vision, work.parallel
    assert vision is not None
    latents = micro_batches * work.latents * vision.width * work.value_bytes
    ranks = parallel.tp * parallel.pp
    # Ranks of one tp x pp lie in different stages, each a whole stage of ranks apart.
    rate = link_rate(work.cluster, parallel.tp if parallel.pp == 1 else float("inf"))
    seconds = latents * (ranks > 1) / rate
    if work.trains_resampler:
        weights = sum(tensor.size for tensor in resampler_tensors(work.model))
        seconds += _all_reduced(latents, parallel.pp) / rate + _all_reduced(GRADIENT_BYTES * weights, ranks) / rate
    return seconds


def encoder_products(vision: VisionConfig, images: float) -> list[Product]:
    """Of a forward pass: patches; four matrices and an MLP in each layer."""
    encoder, rows = vision.encoder, images * num_patches(vision.encoder)
    width, ffn, layers = encoder.hidden_size, encoder.ffn_hidden_size, encoder.num_layers
    return [
        Product(rows, width, 3 * encoder.patch_size**2), Product(rows, width, width, 4 * layers),
        Product(rows, ffn, width, layers), Product(rows, width, ffn, layers),
    ]  # fmt: skip


def resampler_products(vision: VisionConfig, images: float) -> list[Product]:
    """Of a forward pass: queries and output, keys and values of features and latents, MLP."""
    settings, width, ffn = vision.resampler, vision.width, vision.resampler_ffn
    rows, layers, both = images * settings.num_latents, settings.num_layers, Gradients()
    seen = rows + images * num_patches(vision.encoder)
    return [
        Product(rows, width, width, 2 * layers, both), Product(seen, 2 * width, width, layers, both),
        Product(rows, ffn, width, layers, both), Product(rows, width, ffn, layers, both),
    ]  # fmt: skip


def _score_flops(vision: VisionConfig, images: float) -> tuple[float, float]:
    """Forward FLOP of scores and their product with values: of the encoder, of the resampler."""
    patches, latents, width = num_patches(vision.encoder), vision.resampler.num_latents, vision.width
    of_encoder = 4.0 * images * vision.encoder.num_layers * patches**2 * width
    return of_encoder, 4.0 * images * vision.resampler.num_layers * latents * (patches + latents) * width


def _elementwise(vision: VisionConfig, images: float, *, passes: int) -> float:
    """Elements that kernels other than products read and write: two norms, two residual sums, the MLP's activation of
    a layer; the resampler also joins normed features and latents. Args: passes: of the resampler."""
    encoder, settings, width = vision.encoder, vision.resampler, vision.width
    patches = images * num_patches(encoder)
    rows = images * settings.num_latents
    of_encoder = encoder.num_layers * patches * (10 * width + 2 * encoder.ffn_hidden_size)
    of_layer = rows * (10 * width + 2 * vision.resampler_ffn) + (patches + rows) * 4 * width
    return of_encoder + passes * settings.num_layers * of_layer


def _all_reduced(size: float, ranks: int) -> float:
    return 2 * (ranks - 1) / ranks * size

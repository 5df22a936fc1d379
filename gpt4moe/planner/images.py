"""What images cost a run: bytes of encoder, pixels, latents, resampler and gated blocks on a rank.

    before the schedule  each rank of tp x pp: pixels of its own micro-batches -> encoder, no gradient -> resampler
                         -> latents -> to all ranks of tp x pp
    in the schedule      every gated block of every stage attends to them, and adds to their gradient
    after it             sums over pp -> backward through the resampler, on the rank that made them

training.images has it. The encoder is whole on every rank. Letters, for an image of one frame: L latents, P patches, D
the encoder's width, F the MLP's.
"""

from dataclasses import dataclass

from gpt4moe.architecture.image_flops import encoder_parameters, num_patches
from gpt4moe.architecture.vision import RESAMPLER
from gpt4moe.config.run import RunConfig
from gpt4moe.parallel.layout import Layout
from gpt4moe.planner.micro_batch import FLOAT, Bytes, MicroBatch


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageMemory:
    """Bytes on one rank of a vision model, beside those of its stage. All ranks of a run hold equally much."""

    encoder: int
    """Its weights, frozen."""
    pixels: int
    """uint8, of the micro-batches that this rank makes the latents of."""
    latents: int
    """Of every micro-batch of the step, and their gradients where the resampler is trained."""
    resampler: int
    """What autograd keeps of it from before the schedule until after it, of the micro-batches that this rank makes."""
    passing: int
    """Temporaries of the encoder, before the schedule has kept anything."""

    @property
    def held_bytes(self) -> int:
        return self.encoder + self.pixels + self.latents + self.resampler


def image_memory(run: RunConfig, layout: Layout, micro: MicroBatch) -> ImageMemory | None:
    """None: a text model."""
    vision = run.model.vision
    if vision is None:
        return None
    micro_batches = run.training.global_batch_size // (run.training.micro_batch_size * layout.dp)
    images, is_trained = micro.batch * micro.images, trains_resampler(micro)
    own = own_micro_batches(micro_batches, layout)
    latents = images * vision.resampler.num_latents * vision.width * micro.item
    kept = sum(resampler_activations(micro, images).values()) + latents  # what it made has a storage of its own
    pixels = images * 3 * vision.encoder.image_size**2
    return ImageMemory(
        encoder=encoder_parameters(vision.encoder) * micro.item,
        pixels=own * pixels,
        latents=micro_batches * latents * (2 if is_trained else 1),
        resampler=own * kept if is_trained else 0,
        passing=encoder_workspace(micro, images),
    )


def own_micro_batches(micro_batches: int, layout: Layout) -> int:
    """Micro-batches whose latents the busiest rank of tp x pp makes: they take turns."""
    return -(-micro_batches // (layout.tp * layout.pp))


def trains_resampler(micro: MicroBatch) -> bool:
    return micro.trained is None or any(name.startswith(RESAMPLER) for name in micro.trained)


def resampler_activations(micro: MicroBatch, images: int) -> Bytes:
    """Bytes that autograd keeps of the resampler's forward pass, all parameters trained.

    Of a layer, with R = images x L latents and C = images x (P + L) features and latents:
        C D   input of keys and values         2 C D  keys and values
        6 R D inputs of both norms of latents, of queries and of the MLP; queries; what is attended
        R F   the MLP's activation             fp32: logsumexp of each head's rows, two numbers of each norm's rows
    The first layer's latents are the parameter. Features and the last norm's input are kept once.
    """
    vision = micro.model.vision
    assert vision is not None
    settings, width, item = vision.resampler, vision.width, micro.item
    rows, seen = images * settings.num_latents, images * num_patches(vision.encoder)
    both = rows + seen
    layer = (3 * both + 6 * rows) * width * item + rows * vision.resampler_ffn * item
    numbers = (settings.num_attention_heads * rows + 2 * (seen + 2 * rows)) * FLOAT
    return {
        "resampler_features": seen * width * item,
        "resampler_layers": settings.num_layers * (layer + numbers) - rows * width * item,
        "resampler_norm": rows * (width * item + 2 * FLOAT),
    }


def gated_activations(micro: MicroBatch, norm: int) -> Bytes:
    """Of a gated block (model.gated_attention). Its two outputs are kept for the gates; the latents themselves once for
    all blocks (image_memory).

    Args:
        norm: bytes of one norm.
    """
    model, layout = micro.model, micro.layout
    assert model.vision is not None
    heads = model.num_attention_heads // layout.tp
    width = heads * model.head_size * micro.item
    ffn = model.vision.ffn_hidden_size // layout.tp * micro.item
    return {
        "gated_norms": 2 * norm,
        "gated_inputs": 2 * micro.hidden_bytes,
        "gated_outputs": 2 * micro.hidden_bytes,
        # Queries, what is attended, with and without gaps; keys and values; each row's logsumexp.
        "gated_attention": (3 * micro.tokens + 2 * micro.latents) * width + micro.tokens * heads * FLOAT,
        "gated_mask": micro.sequence * micro.latents * micro.item,  # added to the scores of all heads
        "gated_mlp": 4 * micro.tokens * ffn,  # gate and up, SiLU of the gate, the product
    }


def encoder_workspace(micro: MicroBatch, images: int) -> int:
    """Bytes of temporaries of the encoder's forward pass, but for what a convolution copies for itself; the largest of

    pixels in fp32, twice    while they are normalised
    pixels as the encoder takes them, kept until its end, with the larger of
        8 P D                embeddings, a layer's input, its norm, queries, keys, values, attended, in rows again
        4 P D + 2 P F        embeddings, a layer's input, what it adds to, its norm; the MLP's two inner tensors
    """
    vision = micro.model.vision
    assert vision is not None
    encoder, rows = vision.encoder, images * num_patches(vision.encoder)
    pixels = images * 3 * encoder.image_size**2
    width, ffn = rows * encoder.hidden_size * micro.item, rows * encoder.ffn_hidden_size * micro.item
    return max(2 * pixels * FLOAT, pixels * micro.item + max(8 * width, 4 * width + 2 * ffn))

"""Images of texts in flight: what gated blocks attend to, made once and kept until its texts have ended.

    pixels -> encoder -> resampler -> latents [L, W] of each image     LatentMaker; every rank for itself, no message
    latents -> keys, values of each gated block of this rank           ImageCache: a slot for each image
    step: tokens that see the same number of images, padded together   StepImages: [n, Q] tokens, n slots

An image is made when a text with it joins, and once for all texts in flight that have it. So a step of generation
computes no key of an image. Every token attends to all latents of one image, so no mask is needed; those before the
first image to none.

Letters: L latents of an image, W their width, N heads of this rank, D head size, T tokens of a step.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from gpt4moe.inference.batch import Row, Step
from gpt4moe.inference.pictures import Picture, Pixels
from gpt4moe.model.parameters import decoder_layers
from gpt4moe.model.vision_encoder import FrozenEncoder


class LatentMaker:
    """Encoder and resampler of a vision model on this rank.

    Args:
        resampler: the VisionChunk, wrapped or not.
    """

    def __init__(self, encoder: FrozenEncoder, resampler: Any):
        self.encoder, self.resampler = encoder, resampler
        self.num_made = 0
        """Images that passed through both."""

    @torch.no_grad()
    def latents(self, pixels: Pixels) -> Tensor:
        """[L, W] of one image or clip. Alone, so that it does not depend on what else is asked for."""
        self.num_made += 1
        frames = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(self.encoder.mean.device)
        made: Tensor = self.resampler(self.encoder.features(frames), [len(pixels)])
        return made[0]


@dataclass(frozen=True, slots=True)
class ImagePart:
    """Tokens of a step whose attention to images is one call."""

    tokens: Tensor
    """[n, Q] index among the step's tokens. Behind the last one of its image: any."""
    real: Tensor
    """Index of those that count among the n * Q. Numbers, not a mask: a GPU need not tell the host how many."""
    places: Tensor
    """Where these are among the step's tokens."""
    slots: Tensor
    """[n], of the image that they see."""


class ImageCache:
    """Keys and values of images for the gated blocks of this rank.

    Args:
        blocks: layer number, from 1 -> its gated block.
        maker: None: no request has images.
    """

    def __init__(self, blocks: Mapping[int, Any], maker: LatentMaker | None, *, dtype: torch.dtype):
        self.blocks, self.maker, self.dtype = blocks, maker, dtype
        self.layers: dict[int, Tensor] = {}
        """Of each gated block [slots, 2, N, L, D]; they grow as slots are taken."""
        self.open(0)

    def open(self, num_slots: int) -> None:
        """Forgets all images; as many may be kept from now on."""
        self.num_slots, self.high_water = num_slots, 0
        self.slots: dict[str, int] = {}
        """Digest of each image that is kept -> its slot; one that no text needs stays until its slot is taken."""
        self.uses: Counter[str] = Counter()
        """Texts in flight that need it."""
        if any(len(kept) > num_slots for kept in self.layers.values()):
            self.layers = {}

    def has_all(self, images: Sequence[Picture]) -> bool:
        """Whether none of a text's images must be made."""
        return all(image.digest in self.slots for image in images)

    def join(self, images: Sequence[Picture]) -> list[int] | None:
        """The slot of each image of a text that begins, all made; None: there is no room now."""
        wanted = {image.digest: image for image in images}
        in_use = {digest for digest, count in self.uses.items() if count}
        if len(in_use | wanted.keys()) > self.num_slots:
            return None
        self.uses.update(wanted.keys())
        for digest, image in wanted.items():
            if digest not in self.slots:
                self.slots[digest] = slot = self._free_slot()
                self._make(slot, image)
        return [self.slots[image.digest] for image in images]

    def leave(self, images: Sequence[Picture]) -> None:
        """A text has ended."""
        self.uses.subtract({image.digest for image in images})

    def _free_slot(self) -> int:
        if self.high_water < self.num_slots:
            self.high_water += 1
            return self.high_water - 1
        idle = next(digest for digest in self.slots if not self.uses[digest])
        return self.slots.pop(idle)

    def _make(self, slot: int, image: Picture) -> None:
        pixels = image.read()  # on every rank, so that a file that has gone stops all of them
        if not self.blocks:
            return
        assert self.maker is not None, "Generator.check refuses images that nothing makes latents of"
        latents = self.maker.latents(pixels).to(self.dtype).unsqueeze(1)
        for number, block in self.blocks.items():
            made = torch.stack(block.keys_values(latents))[:, 0]
            kept = self.layers.get(number)
            if kept is None or slot >= len(kept):
                size = min(self.num_slots, max(slot + 1, 0 if kept is None else 2 * len(kept)))
                grown = made.new_empty(size, *made.shape)
                if kept is not None:
                    grown[: len(kept)] = kept
                self.layers[number] = kept = grown
            kept[slot] = made

    @property
    def memory_bytes(self) -> int:
        """Of all gated blocks of this rank, as grown so far."""
        return sum(kept.numel() * kept.element_size() for kept in self.layers.values())


def image_cache(chunks: Sequence[Any], maker: LatentMaker | None, dtype: torch.dtype) -> ImageCache:
    """Of the gated blocks of a rank's GPTModels, wrapped or not."""
    layers = {index + 1: layer for chunk in chunks for index, layer in decoder_layers(chunk).items()}
    gated = {number: getattr(layer, "gated_cross_attention", None) for number, layer in layers.items()}
    blocks = {number: block for number, block in gated.items() if block is not None}
    return ImageCache(blocks, maker, dtype=dtype)


def num_distinct(images: Sequence[Picture]) -> int:
    return len({image.digest for image in images})


@dataclass(frozen=True, slots=True)
class StepImages:
    """Which images the tokens of a step see."""

    cache: ImageCache
    parts: tuple[ImagePart, ...]

    def attend(self, layer_number: int, query: Tensor) -> Tensor:
        """query [T, 1, N, D] -> [T, 1, N * D], 0 where a token sees no image (GatedCrossAttention.apply_to)."""
        kept, query = self.cache.layers[layer_number], query[:, 0]
        out = torch.zeros_like(query)
        for part in self.parts:
            key, value = kept.index_select(0, part.slots).unbind(1)
            q = query[part.tokens].transpose(1, 2)
            found = torch.nn.functional.scaled_dot_product_attention(q, key, value).transpose(1, 2)
            out.index_copy_(0, part.places, found.flatten(0, 1).index_select(0, part.real))
        return out.flatten(1).unsqueeze(1)


def images_of(step: Step, cache: ImageCache) -> StepImages | None:
    """Before the rows have grown by the step. None: no token of it sees an image."""
    groups: dict[int, list[tuple[int, int, int]]] = {}
    start = 0
    for row, count in zip(step.rows, step.counts, strict=True):
        for first, length, slot in _seen(row, count):
            # As in batch: at most half of a row of the grid is empty.
            groups.setdefault(length.bit_length(), []).append((start + first, length, slot))
        start += count
    if not groups:
        return None
    device = step.tokens.device
    return StepImages(cache, tuple(_part(stretches, device) for stretches in groups.values()))


def _seen(row: Row, count: int) -> list[tuple[int, int, int]]:
    """(first of the row's new tokens, how many, slot) of each image that some of them see."""
    found = []
    for number, (image, slot) in enumerate(zip(row.images, row.image_slots, strict=True), start=1):
        following = row.images[number].place if number < len(row.images) else len(row.tokens)
        first, last = max(image.place, row.num_cached), min(following, row.num_cached + count)
        if first < last:
            found.append((first - row.num_cached, last - first, slot))
    return found


def _part(stretches: Sequence[tuple[int, int, int]], device: torch.device) -> ImagePart:
    width = max(length for _, length, _ in stretches)
    numbers = [
        [start + min(column, length - 1) for start, length, _ in stretches for column in range(width)],
        [at * width + column for at, (_, length, _) in enumerate(stretches) for column in range(length)],
        [start + column for start, length, _ in stretches for column in range(length)],
        [slot for _, _, slot in stretches],
    ]
    # One tensor, as in batch.pack.
    together = torch.tensor(list(chain.from_iterable(numbers)), device=device)
    tokens, real, places, slots = together.split([len(some) for some in numbers])
    return ImagePart(tokens.view(len(stretches), width), real, places, slots)

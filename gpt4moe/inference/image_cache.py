"""Images of texts in flight: what gated blocks attend to, made once and kept until its texts have ended.

    pixels -> encoder -> resampler -> latents [L, W] of each image     LatentMaker; every rank for itself, no message
    latents -> keys, values of each gated block of this rank           ImageCache: a slot for each image
    step: tokens that see one image attend to it together              StepImages: an image after the other

An image is made when a text with it joins, and once for all texts in flight that have it. So a step of generation
computes no key of an image. Every token attends to all latents of one image, so no mask is needed; those before the
first image to none. An image is a tensor of its own, read where it lies: nothing is gathered, and nothing is copied
when more images come.

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
from gpt4moe.parallel.agreement import raise_together
from gpt4moe.parallel.groups import ProcessGroups


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


class ImageCache:
    """Keys and values of images for the gated blocks of this rank.

    Args:
        blocks: layer number, from 1 -> its gated block.
        maker: None: no request has images.
        groups: of the ranks that keep the same images.
    """

    def __init__(
        self, blocks: Mapping[int, Any], maker: LatentMaker | None, groups: ProcessGroups, *, dtype: torch.dtype
    ):
        self.blocks, self.maker, self.groups, self.dtype = blocks, maker, groups, dtype
        self.layers: dict[int, dict[int, Tensor]] = {number: {} for number in blocks}
        """Of each gated block: slot -> [2, N, L, D]."""
        self.open(0)

    def open(self, num_slots: int) -> None:
        """Forgets all images; as many may be kept from now on."""
        self.num_slots, self.high_water = num_slots, 0
        self.slots: dict[str, int] = {}
        """Digest of each image that is kept -> its slot; one that no text needs stays until its slot is taken."""
        self.uses: Counter[str] = Counter()
        """Texts in flight that need it."""
        for kept in self.layers.values():
            for slot in [slot for slot in kept if slot >= num_slots]:
                del kept[slot]

    def has_all(self, images: Sequence[Picture]) -> bool:
        """Whether none of a text's images must be made."""
        return all(image.digest in self.slots for image in images)

    def join(self, images: Sequence[Picture]) -> list[int] | None:
        """The slot of each image of a text that begins, all made; None: there is no room now. Collective over the copy
        where one is made.

        Raises: DataError when an image cannot be read any more; LaunchError where another rank of the copy cannot.
        """
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
        # On every rank. A file that changes meanwhile may be right for one and wrong for the next.
        with raise_together(self.groups, self.groups.model):
            pixels = image.read()
        if not self.blocks:
            return
        assert self.maker is not None, "Generator.check refuses images that nothing makes latents of"
        latents = self.maker.latents(pixels).to(self.dtype).unsqueeze(1)
        for number, block in self.blocks.items():
            self.layers[number].pop(slot, None)  # before the new one is there: a slot is counted once
            self.layers[number][slot] = torch.stack(block.keys_values(latents))[:, 0]

    @property
    def memory_bytes(self) -> int:
        """Of all gated blocks of this rank, as far as slots were taken."""
        return sum(image.untyped_storage().nbytes() for kept in self.layers.values() for image in kept.values())


def image_cache(
    chunks: Sequence[Any], maker: LatentMaker | None, groups: ProcessGroups, dtype: torch.dtype
) -> ImageCache:
    """Of the gated blocks of a rank's GPTModels, wrapped or not."""
    layers = {index + 1: layer for chunk in chunks for index, layer in decoder_layers(chunk).items()}
    gated = {number: getattr(layer, "gated_cross_attention", None) for number, layer in layers.items()}
    blocks = {number: block for number, block in gated.items() if block is not None}
    return ImageCache(blocks, maker, groups, dtype=dtype)


def num_distinct(images: Sequence[Picture]) -> int:
    return len({image.digest for image in images})


@dataclass(frozen=True, slots=True)
class StepImages:
    """Which images the tokens of a step see."""

    cache: ImageCache
    slots: Sequence[int]
    """Of each image that some token sees."""
    counts: Sequence[int]
    """Tokens that see it."""
    places: Tensor
    """Index of these among the step's tokens, those of one image after those of another."""

    def attend(self, layer_number: int, query: Tensor) -> Tensor:
        """query [T, 1, N, D] -> [T, 1, N * D], 0 where a token sees no image (GatedCrossAttention.apply_to)."""
        kept, query = self.cache.layers[layer_number], query[:, 0]
        out, found = torch.zeros_like(query), []
        for slot, q in zip(self.slots, query.index_select(0, self.places).split(self.counts), strict=True):
            key, value = kept[slot].unsqueeze(1).unbind()
            seen = torch.nn.functional.scaled_dot_product_attention(q.transpose(0, 1).unsqueeze(0), key, value)
            found.append(seen[0].transpose(0, 1))
        return out.index_copy_(0, self.places, torch.cat(found)).flatten(1).unsqueeze(1)


def images_of(step: Step, cache: ImageCache) -> StepImages | None:
    """Before the rows have grown by the step. None: no token of it sees an image."""
    places: dict[int, list[int]] = {}
    start = 0
    for row, count in zip(step.rows, step.counts, strict=True):
        for first, length, slot in _seen(row, count):
            places.setdefault(slot, []).extend(range(start + first, start + first + length))
        start += count
    if not places:
        return None
    # One tensor, as in batch.pack.
    together = torch.tensor(list(chain.from_iterable(places.values())), device=step.tokens.device)
    return StepImages(cache, list(places), [len(some) for some in places.values()], together)


def _seen(row: Row, count: int) -> list[tuple[int, int, int]]:
    """(first of the row's new tokens, how many, slot) of each image that some of them see."""
    found = []
    for number, (image, slot) in enumerate(zip(row.images, row.image_slots, strict=True), start=1):
        following = row.images[number].place if number < len(row.images) else len(row.tokens)
        first, last = max(image.place, row.num_cached), min(following, row.num_cached + count)
        if first < last:
            found.append((first - row.num_cached, last - first, slot))
    return found

"""How a rank's memory is shared out: blocks of keys and values for texts, slots for images, what a step gathers.

rows that may be in flight -> what they need at once -> all of it, or where memory is short a share for each kind

A step reads the cache one layer after the other: it gathers the blocks of its rows, as many for each as the longest has
(KeyValueCache.read). Between steps the same room takes the old tensor of a layer that grows (KeyValueCache.grow).
Images are read where they lie. Numbers alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from gpt4moe.config.model import ModelConfig
from gpt4moe.config.parallel import ParallelConfig
from gpt4moe.errors import ConfigError
from gpt4moe.inference.cache import BLOCK_TOKENS, block_bytes, blocks_of, image_bytes, layer_bytes

Sizes = Sequence[tuple[int, int]]
"""Blocks and images of each row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheRoom:
    """What a rank may keep."""

    limit_bytes: int
    block_bytes: int
    """Of a block of tokens, in all layers of the rank that has most."""
    layer_bytes: int
    """Of a block of tokens in one layer, the largest."""
    image_bytes: int
    """Of an image, likewise."""
    most_rows: int
    """In flight at once."""

    @classmethod
    def of(
        cls, model: ModelConfig, parallel: ParallelConfig, value_bytes: int, *, limit_bytes: int, most_rows: int
    ) -> "CacheRoom":
        return cls(
            limit_bytes=limit_bytes, block_bytes=block_bytes(model, parallel, value_bytes),
            layer_bytes=layer_bytes(model, parallel, value_bytes),
            image_bytes=image_bytes(model, parallel, value_bytes), most_rows=most_rows,
        )  # fmt: skip

    def shares(self, sizes: Sizes) -> tuple[int, int, int]:
        """(blocks, slots of images, blocks that a step gathers in a layer) that the rows in flight may need at once, or
        that fit: further rows then wait.

        Where memory is short, all kinds get their share, but never less than one row needs if that fits. Where not
        even one image fits beside the longest row, which need not come, they get their share alone.

        Args:
            sizes: of the rows that are asked for, or may be.
        """
        blocks, images = ([one[which] for one in sizes] for which in (0, 1))
        wanted, slots = (sum(sorted(some, reverse=True)[: self.most_rows]) for some in (blocks, images))
        longest = max(blocks, default=0)
        gathered = longest * min(len(blocks), self.most_rows)
        texts = wanted * self.block_bytes + gathered * self.layer_bytes
        alone = longest * (self.block_bytes + self.layer_bytes)
        needed = texts + slots * self.image_bytes
        if slots and needed > self.limit_bytes:
            share = slots * self.limit_bytes // needed
            beside = (self.limit_bytes - alone) // self.image_bytes
            slots = min(max(share, max(images)), beside) if beside > 0 else share
        left = self.limit_bytes - slots * self.image_bytes
        if texts > left:
            gathered = gathered * left // texts
            if alone <= left:
                gathered = min(max(gathered, longest), (left - longest * self.block_bytes) // self.layer_bytes)
            wanted = min(wanted, (left - gathered * self.layer_bytes) // self.block_bytes)
        # A layer that grows for the last time has at least one block less.
        return min(wanted, gathered + 1), slots, gathered

    def holds(self, blocks: int, slots: int, gathered: int) -> bool:
        """Whether all of these fit, as shares returns them."""
        needed = blocks * self.block_bytes + slots * self.image_bytes + gathered * self.layer_bytes
        return needed <= self.limit_bytes

    def require(self, num_tokens: int, num_images: int, open_to: Sizes | None) -> None:
        """Raises: ConfigError when one text of so many tokens and images does not fit.

        Args:
            open_to: of the rows that may arrive while it runs; None: it may have everything.
        """
        blocks = blocks_of(num_tokens - 1)
        num_blocks, num_slots, gathered = self.shares([(blocks, num_images)] if open_to is None else open_to)
        if blocks <= min(num_blocks, gathered) and num_images <= num_slots:
            return
        needed = (self.block_bytes + self.layer_bytes) * blocks + self.image_bytes * num_images
        kinds = f", which hold {num_blocks * BLOCK_TOKENS:,} tokens beside {num_slots:,} images"
        what = f" and {num_images} {'image' if num_images == 1 else 'images'}"
        raise ConfigError(
            f"A text of {num_tokens} tokens{what * bool(num_images)} needs {needed:,} bytes of cache on a rank, with "
            f"what a step gathers of it, but {self.limit_bytes:,} are allowed or free"
            f"{' for all texts' * (open_to is not None)}{kinds * (open_to is not None and num_images > 0)}.",
            f"Generate fewer tokens{', give fewer images' * bool(num_images)}, allow more memory (--cache-gb), or "
            "choose a larger tp or pp.",
        )

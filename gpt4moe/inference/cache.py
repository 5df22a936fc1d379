"""The cache of keys and values: blocks of BLOCK_TOKENS tokens, which rows take as they grow and give back at their end.

    BlockPool      which blocks are free: numbers alone, equal on every rank of a copy of the model
    KeyValueCache  the tensors, [2G, blocks, BLOCK_TOKENS * D] of each layer of this rank; they grow as blocks are taken

A row's blocks need not lie together, so rows of any length come and go without gaps. A row joins only if all the blocks
that it may need are free, so that no row ever waits for a block in the middle of its text.
"""

import heapq
from math import ceil

import psutil
import torch
from torch import Tensor, distributed

from gpt4moe.architecture.cache import rank_cache_bytes, rank_image_bytes
from gpt4moe.config.model import ModelConfig
from gpt4moe.config.parallel import ParallelConfig
from gpt4moe.parallel.groups import ProcessGroups
from gpt4moe.parallel.placement import rank_chunks

BLOCK_TOKENS = 16


def block_bytes(model: ModelConfig, parallel: ParallelConfig, value_bytes: int) -> int:
    """Bytes of one block on the rank with the largest cache, all of its layers together."""
    return max(
        rank_cache_bytes(model, layers, num_tokens=BLOCK_TOKENS, tp=parallel.tp, value_bytes=value_bytes)
        for layers in _layers_of_stages(model, parallel)
    )


def layer_bytes(model: ModelConfig, parallel: ParallelConfig, value_bytes: int) -> int:
    """Bytes of one block in the layer that has most."""
    return max(
        rank_cache_bytes(model, [layer], num_tokens=BLOCK_TOKENS, tp=parallel.tp, value_bytes=value_bytes)
        for layer in range(model.num_layers)
    )


def image_bytes(model: ModelConfig, parallel: ParallelConfig, value_bytes: int) -> int:
    """Bytes that an image of a vision model takes on the rank with most gated blocks; of a text model 0."""
    return max(
        rank_image_bytes(model, layers, tp=parallel.tp, value_bytes=value_bytes)
        for layers in _layers_of_stages(model, parallel)
    )


def _layers_of_stages(model: ModelConfig, parallel: ParallelConfig) -> list[list[int]]:
    return [
        [layer for chunk in rank_chunks(model.num_layers, parallel, index) for layer in chunk]
        for index in range(parallel.pp)
    ]


def free_bytes(groups: ProcessGroups) -> int:
    """Nine tenths of the memory that this rank may still take: of its GPU, else its share of the machine's."""
    if groups.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(groups.device)
    else:
        free = psutil.virtual_memory().available // groups.layout.world_size  # as if all ranks were on this machine
    return free * 9 // 10


def least_free_bytes(groups: ProcessGroups) -> int:
    """free_bytes of the rank that has least, on every rank. Collective over the world."""
    least = torch.tensor([free_bytes(groups)], device=groups.device)
    distributed.all_reduce(least, op=distributed.ReduceOp.MIN)
    return int(least.item())


def blocks_of(num_tokens: int) -> int:
    """Blocks that hold this many tokens."""
    return ceil(num_tokens / BLOCK_TOKENS)


class BlockPool:
    """Numbers of blocks: free, or taken by a row. A row first reserves the most that it may need, then takes."""

    def __init__(self, num_blocks: int, num_gathered: int):
        self.num_blocks = num_blocks
        self.num_gathered = num_gathered
        """Of a layer, that a step may gather: as many for each of its rows as the longest has."""
        self.num_reserved = 0
        self.high_water = 0
        """Blocks 0 to high_water - 1 were taken at some time."""
        self.free: list[int] = []

    def reserve(self, count: int) -> bool:
        """Whether `count` more blocks are reserved now; False: they do not fit."""
        if self.num_reserved + count > self.num_blocks:
            return False
        self.num_reserved += count
        return True

    def take(self) -> int:
        """The lowest free block, for a row that reserved it."""
        if self.free:
            return heapq.heappop(self.free)
        assert self.high_water < self.num_blocks, "a row takes more blocks than it reserved"
        self.high_water += 1
        return self.high_water - 1

    def give_back(self, blocks: list[int], reserved: int) -> None:
        """A row has ended: its blocks, and all that it had reserved."""
        for block in blocks:
            heapq.heappush(self.free, block)
        self.num_reserved -= reserved


class KeyValueCache:
    """Keys (after the rotary embedding) and values of the layers of this rank.

    Args:
        layer_numbers: in the whole model, from 1.
        num_groups: heads of keys on this rank, G.
        head_size: D.
    """

    def __init__(
        self, layer_numbers: list[int], *, num_groups: int, head_size: int, dtype: torch.dtype, device: torch.device
    ):
        self.num_groups, self.head_size = num_groups, head_size
        self.empty = torch.empty(2 * num_groups, 0, BLOCK_TOKENS * head_size, dtype=dtype, device=device)
        self.layers = dict.fromkeys(layer_numbers, self.empty)
        self.num_blocks = 0

    def clear(self) -> None:
        """Gives its memory back; no row is left in it."""
        self.layers, self.num_blocks = dict.fromkeys(self.layers, self.empty), 0

    def grow(self, num_blocks: int, most: int) -> None:
        """Room for `num_blocks` blocks; at least doubled, so that growing costs little, but never above `most`. While a
        layer grows, its old tensor is there too: in the room of what a step gathers (CacheRoom.shares)."""
        if num_blocks <= self.num_blocks:
            return
        self.num_blocks = min(most, max(num_blocks, 2 * self.num_blocks))
        for layer, old in self.layers.items():
            # Zeros: what stands behind a row's last key is masked, but a mask does not take away a NaN.
            new = old.new_zeros(old.shape[0], self.num_blocks, old.shape[2])
            new[:, : old.shape[1]] = old
            self.layers[layer] = new

    @property
    def memory_bytes(self) -> int:
        """Of all layers of this rank, as grown so far."""
        return sum(layer.numel() * layer.element_size() for layer in self.layers.values())

    def append(self, layer_number: int, key: Tensor, value: Tensor, slots: Tensor) -> None:
        """Stores key and value [T, G, D].

        Args:
            slots: [T] int64, block * BLOCK_TOKENS + place in the block.
        """
        layer = self.layers[layer_number]
        flat = layer.view(layer.shape[0], -1, self.head_size)
        flat.index_copy_(1, slots, torch.cat((key, value), dim=1).transpose(0, 1))

    def read(self, layer_number: int, tables: Tensor, num_keys: int) -> tuple[Tensor, Tensor]:
        """Key and value [n, G, num_keys, D] of n rows.

        Args:
            tables: [n, blocks] int64, each row's blocks in order; what stands behind a row's last block is masked.
        """
        both = self.layers[layer_number].index_select(1, tables.flatten())
        both = both.view(2, self.num_groups, len(tables), -1, self.head_size).narrow(3, 0, num_keys).transpose(1, 2)
        key, value = both.unbind()
        return key, value

"""A rank's cache between texts and images: short memory leaves each kind its share, and refusals say true numbers."""

import re
import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gpt4moe.errors import ConfigError
from gpt4moe.inference.cache import BLOCK_TOKENS, KeyValueCache
from gpt4moe.inference.cache_room import CacheRoom

BLOCK, LAYER, IMAGE = 100, 25, 40


def room(limit_bytes: int, most_rows: int = 4) -> CacheRoom:
    return CacheRoom(
        limit_bytes=limit_bytes, block_bytes=BLOCK, layer_bytes=LAYER, image_bytes=IMAGE, most_rows=most_rows
    )


def test_where_everything_fits_everything_is_given() -> None:
    assert room(10_000).shares([(3, 1), (2, 0), (1, 2)]) == (6, 3, 9)
    assert room(10_000, most_rows=2).shares([(3, 1), (2, 0), (1, 2)]) == (5, 3, 6)
    assert room(0).shares([]) == (0, 0, 0)


def test_short_memory_holds_at_least_the_longest_row_with_the_most_images() -> None:
    for limit in range(3 * (BLOCK + LAYER) + 2 * IMAGE, 1900, 5):
        for sizes in ([(3, 2)] * 4, [(3, 2), (1, 0), (1, 0), (1, 0)]):
            blocks, slots, gathered = room(limit).shares(sizes)
            assert blocks >= 3 and slots >= 2 and gathered >= 3
            assert room(limit).holds(blocks, slots, gathered) and blocks - 1 <= gathered


class _Peak(TorchDispatchMode):
    """The most bytes of a cache's tensors that were there at once."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[weakref.ref[torch.Tensor]] = []
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.new_zeros.default:
            self.kept.append(weakref.ref(out))
            self.bytes = max(self.bytes, sum(one.nbytes for one in (ref() for ref in self.kept) if one is not None))
        return out


def test_while_the_cache_grows_one_layer_alone_has_its_old_tensor_too() -> None:
    cache = KeyValueCache([1, 2, 3], num_groups=1, head_size=2, dtype=torch.float32, device=torch.device("cpu"))
    of_layer = 2 * BLOCK_TOKENS * 2 * 4
    with _Peak() as peak:
        for num_blocks in range(1, 11):
            cache.grow(num_blocks, 10)
    # 1, 2, 4, 8, 10 blocks. The old tensor of the last layer to grow is in the room of what a step gathers.
    assert cache.memory_bytes == 3 * 10 * of_layer and peak.bytes == (3 * 10 + 8) * of_layer


def test_a_cache_below_one_whole_context_keeps_room_for_images_too() -> None:
    """A server is open to texts of the whole context with many images, but most are short."""
    open_to = [(8, 32)] * 4
    blocks, slots, gathered = room(800).shares(open_to)
    assert slots >= 5 and min(blocks, gathered) >= 2 and blocks * BLOCK + slots * IMAGE + gathered * LAYER <= 800
    room(800).require(2 * BLOCK_TOKENS, 5, open_to)


def test_a_refusal_s_numbers_agree_with_each_other() -> None:
    with pytest.raises(ConfigError, match=r"33 tokens needs 250 bytes .* but 249 are allowed or free\."):
        room(249).require(33, 0, None)
    with pytest.raises(ConfigError, match=r"1 image needs 290 bytes .* but 289 are allowed or free\."):
        room(289).require(33, 1, None)
    room(290).require(33, 1, None)
    open_to = [(8, 32)] * 4
    blocks, slots, _ = room(700).shares(open_to)
    with pytest.raises(ConfigError) as refused:
        room(700).require(33, slots + 1, open_to)
    wanted = rf"for all texts, which hold {blocks * BLOCK_TOKENS} tokens beside {slots} images\."
    assert re.search(wanted, refused.value.cause) and "fewer images" in refused.value.cure

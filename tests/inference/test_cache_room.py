"""A rank's cache between texts and images: short memory leaves each kind its share, and refusals say true numbers."""

import re

import pytest

from gpt4moe.errors import ConfigError
from gpt4moe.inference.cache import BLOCK_TOKENS
from gpt4moe.inference.cache_room import CacheRoom

BLOCK, IMAGE = 100, 40


def room(limit_bytes: int, most_rows: int = 4) -> CacheRoom:
    return CacheRoom(limit_bytes=limit_bytes, block_bytes=BLOCK, image_bytes=IMAGE, most_rows=most_rows)


def test_where_everything_fits_everything_is_given() -> None:
    assert room(10_000).shares([(3, 1), (2, 0), (1, 2)]) == (6, 3)
    assert room(10_000, most_rows=2).shares([(3, 1), (2, 0), (1, 2)]) == (5, 3)
    assert room(0).shares([]) == (0, 0)


def test_short_memory_holds_at_least_the_longest_row_with_the_most_images() -> None:
    for limit in range(380, 1000, 20):
        blocks, slots = room(limit).shares([(3, 2)] * 4)
        assert blocks >= 3 and slots >= 2 and blocks * BLOCK + slots * IMAGE <= limit


def test_a_cache_below_one_whole_context_keeps_room_for_images_too() -> None:
    """A server is open to texts of the whole context with many images, but most are short."""
    open_to = [(8, 32)] * 4
    blocks, slots = room(700).shares(open_to)
    assert slots >= 5 and blocks >= 2 and blocks * BLOCK + slots * IMAGE <= 700
    room(700).require(2 * BLOCK_TOKENS, 5, open_to)


def test_a_refusal_s_numbers_agree_with_each_other() -> None:
    with pytest.raises(ConfigError, match=r"33 tokens needs 200 bytes .* but 199 are allowed or free\."):
        room(199).require(33, 0, None)
    with pytest.raises(ConfigError, match=r"1 image needs 240 bytes .* but 239 are allowed or free\."):
        room(239).require(33, 1, None)
    room(240).require(33, 1, None)
    open_to = [(8, 32)] * 4
    blocks, slots = room(700).shares(open_to)
    with pytest.raises(ConfigError) as refused:
        room(700).require(33, slots + 1, open_to)
    wanted = rf"for all texts, which hold {blocks * BLOCK_TOKENS} tokens beside {slots} images\."
    assert re.search(wanted, refused.value.cause) and "fewer images" in refused.value.cure

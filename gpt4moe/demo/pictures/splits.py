"""Which combinations, words and clips of the drawn set are learned, which are read while training, which are asked.

    learned   of the pictures to learn
    valid     held out; training.eval_every reads them, so whoever chooses settings may look at them
    asked     held out; examined when all training has ended

A key (items.Item.key) is of one split alone, whatever the seed.
"""

import itertools
import random
from functools import lru_cache
from typing import Literal

from gpt4moe.data.folder import held_out
from gpt4moe.demo.pictures.drawing import COLOURS, DIRECTIONS, PLACES, SHAPES, SIZES

Split = Literal["learned", "valid", "asked"]
_DRAW = 4
"""Raised when settings were chosen by what the asked keys gave: then others are asked."""
_SHARES = {"relations": (0.1, 0.05), "words": (0.1, 0.03), "few_shot": (0.2, 0.1)}
"""Of all keys: asked, valid."""
_VALID_OF_COMBINATIONS = 0.4
"""Valid combinations for each that is asked."""


def split_of(kind: str, key: str) -> Split:
    if kind in _SHARES:
        asked, valid = _SHARES[kind]
        document = f"{_DRAW}/{kind}/{key}"
        if held_out(document, asked):
            return "asked"
        return "valid" if held_out(document, asked + valid) else "learned"
    return _combinations(kind).get(key, "learned")


@lru_cache(maxsize=2)
def _combinations(kind: str) -> dict[str, Split]:
    """Held-out combinations of attributes and clips. Asked is one colour for each combination of the rest, so all
    shapes, sizes, places and directions are asked equally often: a constant answer gets little."""
    rest: list[tuple[str, ...]] = list(
        itertools.product(SIZES, SHAPES, PLACES) if kind == "attributes" else itertools.product(SHAPES, DIRECTIONS)
    )
    rng = random.Random(f"{kind}/{_DRAW}")
    colours = (list(COLOURS) * len(rest))[: len(rest)]
    rng.shuffle(colours)
    asked = dict(zip(rest, colours, strict=True))
    found: dict[str, Split] = {_key(one, colour): "asked" for one, colour in asked.items()}
    for one in rng.sample(rest, round(_VALID_OF_COMBINATIONS * len(rest))):
        found[_key(one, rng.choice([colour for colour in COLOURS if colour != asked[one]]))] = "valid"
    return found


def _key(rest: tuple[str, ...], colour: str) -> str:
    """As items.py: size, colour, shape, place; or colour, shape, direction."""
    at = len(rest) - 2
    return " ".join((*rest[:at], colour, *rest[at:]))

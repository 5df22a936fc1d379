"""Which combinations, words and clips of the drawn set are learned, which are read while training, which are asked.

    learned   of the pictures to learn
    valid     held out; training.eval_every reads them, so whoever chooses settings may look at them
    asked     held out; examined when all training has ended

A key (items.Item.key) is of one split alone, whatever the seed.
"""

import itertools
import random
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from typing import Literal

from gpt4moe.data.folder import held_out
from gpt4moe.demo.pictures.drawing import COLOURS, DIRECTIONS, PLACES, SHAPES, SIZES

Split = Literal["learned", "valid", "asked"]
_DRAW = 5
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
    shapes, sizes, places and directions are asked equally often: a constant answer gets little.

    Two held-out ones never differ in just one word, unless that is the colour. So of what three words of attributes
    leave open no more than one value is held out (two colours), and what is learned says nothing against a word.
    """
    rest: list[tuple[str, ...]] = list(
        itertools.product(SIZES, SHAPES, PLACES) if kind == "attributes" else itertools.product(SHAPES, DIRECTIONS)
    )
    rng = random.Random(f"{kind}/{_DRAW}")
    while True:
        rng.shuffle(rest)
        found: dict[tuple[str, ...], Split] = {}
        _hold_out(found, rest, "asked", rng)
        _hold_out(found, rest[: round(_VALID_OF_COMBINATIONS * len(rest))], "valid", rng)
        if len(found) == round((1 + _VALID_OF_COMBINATIONS) * len(rest)):
            return {" ".join(key): split for key, split in found.items()}


def _hold_out(
    found: dict[tuple[str, ...], Split], rest: list[tuple[str, ...]], split: Split, rng: random.Random
) -> None:
    """Adds a combination for each one of the rest: in the least used of the colours that are left. None may be."""
    for one in rest:
        keys = [key for key in (_key(one, colour) for colour in COLOURS) if key not in found and not _near(key, found)]
        if keys:
            used = Counter(word for key, of in found.items() if of == split for word in key)
            colour = {key: next(word for word in key if word in COLOURS) for key in keys}
            found[min(rng.sample(keys, len(keys)), key=lambda key: used[colour[key]])] = split


def _near(key: tuple[str, ...], found: Iterable[tuple[str, ...]]) -> bool:
    """Whether one differs in just one word that is no colour."""
    return any(
        [word not in COLOURS for word, other in zip(key, one, strict=True) if word != other] == [True] for one in found
    )


def _key(rest: tuple[str, ...], colour: str) -> tuple[str, ...]:
    """As items.py: size, colour, shape, place; or colour, shape, direction."""
    at = len(rest) - 2
    return (*rest[:at], colour, *rest[at:])

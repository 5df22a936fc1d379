"""An image of a prompt: its place among the tokens, its digest, a way to its pixels. No torch."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
"""An image or clip, [frames, side, side, 3] RGB, of the encoder's size."""


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """An image or clip of a prompt. Tokens from `place` on see it, up to the next picture's."""

    place: int
    """Of its image token in the prompt, from 0."""
    digest: str
    """sha256 of its pixels: equal pictures are encoded once."""
    read: Callable[[], Pixels]
    """Called when its text joins, unless an equal picture is in flight. It must give the same on every rank."""


def picture(pixels: Pixels, place: int) -> Picture:
    """Of pixels that stay in memory."""
    return Picture(place, digest_of(pixels), partial(_itself, pixels))


def digest_of(pixels: Pixels) -> str:
    return hashlib.sha256(repr(pixels.shape).encode() + np.ascontiguousarray(pixels).tobytes()).hexdigest()


def _itself(pixels: Pixels) -> Pixels:
    return pixels

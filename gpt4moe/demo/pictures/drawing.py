"""Drawn pictures of 32 x 32 pixels: shapes, pairs of shapes, words on a small web page, clips of a moving shape.

Every function is deterministic in its random generator and in Pillow's version (its drawing and its built-in font).
"""

import random
from collections.abc import Collection
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

SIDE = 32
COLOURS = {
    "red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 230), "yellow": (235, 215, 40),
    "white": (240, 240, 240), "purple": (150, 50, 190), "pink": (240, 120, 180), "cyan": (60, 210, 220),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "cross", "ring")
SIZES = ("small", "large")
PLACES = {"above": (0, -7), "below": (0, 7), "left of": (-7, 0), "right of": (7, 0)}
"""Where one shape stands, from the middle."""
RELATIONS = {"above": (0, -8), "below": (0, 8), "left of": (-8, 0), "right of": (8, 0)}
"""Where the first of two stands, from the middle; the second stands opposite."""
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
NUM_FRAMES, NUM_LETTERS = 4, 3
_STEP = 5
"""Pixels that a shape of a clip moves from frame to frame."""
_AT_PLACE = 2.5
"""Pixels, each way, within which a shape stands in a place: draw_one puts it within 1."""
_CELL = 10
"""Width of a letter's place: letters stand in a raster, so that each falls into the same patches."""

Picture = NDArray[np.uint8]
"""[SIDE, SIDE, 3] RGB."""


def draw_one(rng: random.Random, colour: str, shape: str, size: str, place: str) -> Picture:
    """One shape on a dark ground."""
    image, draw = _ground(rng)
    x, y = PLACES[place]
    radius = (5 if size == "small" else 7.5) + rng.uniform(-0.5, 0.5)
    _shape(draw, shape, _tinted(rng, colour), (_middle(rng, x), _middle(rng, y)), radius)
    return np.asarray(image)


def draw_two(rng: random.Random, first: tuple[str, str, str], relation: str, second: tuple[str, str, str]) -> Picture:
    """Two shapes, each (size, colour, shape): the first stands `relation` the second."""
    image, draw = _ground(rng)
    x, y = RELATIONS[relation]
    for sign, (size, colour, shape) in ((1, first), (-1, second)):
        radius = (5 if size == "small" else 7) + rng.uniform(-0.3, 0.3)
        centre = (_middle(rng, sign * x), _middle(rng, sign * y))
        _shape(draw, shape, _tinted(rng, colour), centre, radius)
    return np.asarray(image)


def draw_page(rng: random.Random, word: str) -> Picture:
    """A small web page: a coloured bar with its buttons, the word, and grey lines of text below it."""
    light, dark = rng.randint(228, 250), rng.randint(0, 70)
    image = Image.new("RGB", (SIDE, SIDE), (light, light, light))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, SIDE, 5), fill=tuple(rng.randint(90, 180) for _ in range(3)))
    for x in (2, 6):
        draw.rectangle((x, 2, x + 1, 3), fill=(light, light, light))
    left, top = rng.randint(0, 1), rng.randint(8, 9)
    for number, letter in enumerate(word):
        middle = left + _CELL * number + _CELL / 2
        draw.text((middle, top + 12), letter, fill=(dark, dark, dark), font=_font(14), anchor="ms")
    for y in (27, 30):
        draw.line((2, y, rng.randint(14, 29), y), fill=(light - 60,) * 3)
    return np.asarray(image)


def draw_clip(
    rng: random.Random, colour: str, shape: str, direction: str, *, avoid: Collection[str] = ()
) -> list[Picture]:
    """NUM_FRAMES pictures of a shape that moves; what lies across its way is random, its size too.

    Args:
        avoid: places of PLACES where no frame has the shape.
    """
    ground, tint, radius = tuple(rng.randint(0, 50) for _ in range(3)), _tinted(rng, colour), rng.uniform(4.5, 6)
    way = _way(rng, direction)
    while any(place_of(*middle) in avoid for middle in way):
        way = _way(rng, direction)
    frames = []
    for x, y in way:
        image = Image.new("RGB", (SIDE, SIDE), ground)
        _shape(ImageDraw.Draw(image), shape, tint, (SIDE / 2 + x, SIDE / 2 + y), radius)
        frames.append(np.asarray(image))
    return frames


def place_of(x: float, y: float) -> str | None:
    """The place of PLACES where a shape stands whose middle is at x, y from the picture's; None: between them."""
    near = (name for name, (to_x, to_y) in PLACES.items() if max(abs(x - to_x), abs(y - to_y)) <= _AT_PLACE)
    return next(near, None)


def _way(rng: random.Random, direction: str) -> list[tuple[float, float]]:
    """Middles of a clip's shape, from the picture's."""
    dx, dy = DIRECTIONS[direction]
    across, start = rng.uniform(-6, 6), -_STEP * (NUM_FRAMES - 1) / 2 + rng.uniform(-1, 1)
    ways = (start + _STEP * number for number in range(NUM_FRAMES))
    return [(dx * along + abs(dy) * across, dy * along + abs(dx) * across) for along in ways]


def _ground(rng: random.Random) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (SIDE, SIDE), tuple(rng.randint(0, 50) for _ in range(3)))
    return image, ImageDraw.Draw(image)


def _tinted(rng: random.Random, colour: str) -> tuple[int, ...]:
    return tuple(max(0, min(255, value + rng.randint(-15, 15))) for value in COLOURS[colour])


def _middle(rng: random.Random, offset: float) -> float:
    return SIDE / 2 + offset + rng.uniform(-1, 1)


def _shape(
    draw: ImageDraw.ImageDraw, shape: str, colour: tuple[int, ...], centre: tuple[float, float], radius: float
) -> None:
    x, y = centre
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape == "circle":
        draw.ellipse(box, fill=colour)
    elif shape == "square":
        draw.rectangle(box, fill=colour)
    elif shape == "triangle":
        draw.polygon([(x, box[1]), (box[0], box[3]), (box[2], box[3])], fill=colour)
    elif shape == "cross":
        width = 2 if radius < 6 else 3  # thicker, a small one is nearly a square
        draw.line(box, fill=colour, width=width)
        draw.line((box[0], box[3], box[2], box[1]), fill=colour, width=width)
    else:
        draw.ellipse(box, outline=colour, width=2)


@lru_cache(maxsize=4)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)

"""Shard: a rectangle of a logical tensor. Initial weights, checkpoints and tests name parts by it. No torch.

logical tensor   name + global shape, independent of any layout
shard            offset + shape within it, and whether this rank writes it to checkpoints
flat range       the optimizer cuts a shard further into ranges of its C-order elements; each is at most
                 2 * ndim - 1 rectangles (flat_rectangles)
"""

from dataclasses import dataclass
from math import prod

WEIGHT = "weight"
"""The kind of a model's weights, stored as fp32 masters. A stored tensor is called KIND/NAME. Each optimizer state is
a kind too, by its name in config.optimizer_table."""
BUFFER = "buffer"
"""The kind of a model's state without gradient, such as a router's bias."""


@dataclass(frozen=True, slots=True)
class Shard:
    """The rectangle [offset, offset + shape) of the logical tensor `name`."""

    name: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    is_writer: bool = True
    """False if another rank writes the same values to checkpoints."""

    @property
    def size(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class Rectangle:
    """A part of a shard that is contiguous in C order. `start`: elements of the shard before it."""

    start: int
    offset: tuple[int, ...]
    shape: tuple[int, ...]


def flat_rectangles(start: int, end: int, shape: tuple[int, ...], base: int = 0) -> list[Rectangle]:
    """The elements [start, end) of a C-order box of `shape`, as contiguous rectangles in ascending order."""
    if start >= end:
        return []
    if len(shape) == 1:
        return [Rectangle(base + start, (start,), (end - start,))]
    inner = prod(shape[1:])
    first, last = start // inner, end // inner

    def partial(row: int, low: int, high: int) -> list[Rectangle]:
        parts = flat_rectangles(low, high, shape[1:], base + row * inner)
        return [Rectangle(part.start, (row, *part.offset), (1, *part.shape)) for part in parts]

    if first == last:
        return partial(first, start - first * inner, end - first * inner)
    parts = []
    if start > first * inner:
        parts += partial(first, start - first * inner, inner)
        first += 1
    if last > first:
        parts.append(Rectangle(base + first * inner, (first, *(0,) * (len(shape) - 1)), (last - first, *shape[1:])))
    if end > last * inner:
        parts += partial(last, 0, end - last * inner)
    return parts

"""A shuffle of range(n) as a function, without a table: an epoch over billions of samples costs no memory.

A balanced Feistel network is a bijection of [0, 4^b), whatever its round function (Luby and Rackoff, 1988). A result
outside range(n) is put in again until it is inside ("cycle walking", Black and Rogaway, 2002); that is a bijection of
range(n). As 4^b < 4n, it takes fewer than 4 tries on average.
"""

import hashlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

_MASK = (1 << 64) - 1
_ROUNDS = 8


def mix64(value: Any) -> Any:
    """The finaliser of splitmix64: 64 bits to 64 well-mixed bits, for an int or a uint64 array."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK
    return value ^ (value >> 31)


def derived_keys(count: int, *parts: object) -> list[int]:
    """`count` (at most 8) 64-bit keys that depend on the parts alone, the same on every machine and Python."""
    digest = hashlib.sha512("/".join(map(str, parts)).encode()).digest()
    return [int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(count)]


@dataclass(frozen=True, slots=True)
class Permutation:
    """An order of range(size), fixed by (seed, epoch, source). Called with a position, it returns the index there."""

    size: int
    seed: int
    epoch: int
    source: str
    _keys: list[int] = field(init=False, repr=False)
    _half_bits: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"a permutation of {self.size} elements")
        object.__setattr__(self, "_keys", derived_keys(_ROUNDS, "order", self.seed, self.epoch, self.source))
        object.__setattr__(self, "_half_bits", max(1, ((self.size - 1).bit_length() + 1) // 2))

    def __call__(self, position: int) -> int:
        """Raises: IndexError when position is outside range(size)."""
        if not 0 <= position < self.size:
            raise IndexError(f"position {position} of a permutation of {self.size}")
        image: int = self._feistel(position)
        while image >= self.size:
            image = self._feistel(image)
        return image

    def indices(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """As for each position alone, in one go. Raises: IndexError when one is outside range(size)."""
        if positions.size and not 0 <= positions.min() <= positions.max() < self.size:
            raise IndexError(f"positions {positions.min()} to {positions.max()} of a permutation of {self.size}")
        image: NDArray[np.uint64] = self._feistel(positions.astype(np.uint64))
        while (outside := np.flatnonzero(image >= self.size)).size:
            image[outside] = self._feistel(image[outside])
        return image.astype(np.int64)

    def _feistel(self, value: Any) -> Any:
        """Of an int below 4^half_bits, or of a uint64 array of such."""
        bits = self._half_bits
        mask = (1 << bits) - 1
        left, right = value >> bits, value & mask
        for key in self._keys:
            left, right = right, left ^ (mix64((right + key) & _MASK) & mask)
        return left << bits | right


@dataclass(frozen=True, slots=True)
class PieceOrder:
    """An order of the pieces of some consecutive windows of another order, each cut into `pieces` equal ones."""

    windows: Permutation
    first: int
    """The first of these windows, as a position in `windows`."""
    pieces: int
    inside: Permutation
    """Of all pieces of these windows."""

    def __call__(self, position: int) -> int:
        """The piece at a position, counted in pieces from position 0 of `windows`; it is piece `index % pieces` of
        window `index // pieces`. Raises: IndexError for a position before or after these windows."""
        window, piece = divmod(self.inside(position - self.first * self.pieces), self.pieces)
        return self.windows(self.first + window) * self.pieces + piece

    def indices(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """As for each position alone, in one go. Raises: IndexError."""
        window, piece = np.divmod(self.inside.indices(positions - self.first * self.pieces), self.pieces)
        return self.windows.indices(self.first + window) * self.pieces + piece

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
_MIX = ((np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)), (np.uint64(27), np.uint64(0x94D049BB133111EB)))
_LAST_SHIFT = np.uint64(31)
"""The shifts and factors of mix64, for arrays."""


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
        image = self._feistel_of_array(positions.astype(np.uint64))
        outside = np.flatnonzero(image >= self.size)
        while outside.size:
            again = self._feistel_of_array(image[outside])
            image[outside] = again
            outside = outside[again >= self.size]
        return image.astype(np.int64)

    def _feistel(self, value: int) -> int:
        """Of an int below 4^half_bits."""
        bits = self._half_bits
        mask = (1 << bits) - 1
        left, right = value >> bits, value & mask
        for key in self._keys:
            left, right = right, left ^ (mix64((right + key) & _MASK) & mask)
        return left << bits | right

    def _feistel_of_array(self, value: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """As _feistel, of an array. mix64 is written out in place: it costs by the operation and by the copy."""
        bits, mask = np.uint64(self._half_bits), np.uint64((1 << self._half_bits) - 1)
        left, right, shifted = value >> bits, value & mask, np.empty_like(value)
        for key in self._keys:
            mixed = right + np.uint64(key)
            for shift, factor in _MIX:
                mixed ^= np.right_shift(mixed, shift, out=shifted)
                mixed *= factor
            mixed ^= np.right_shift(mixed, _LAST_SHIFT, out=shifted)
            mixed &= mask
            mixed ^= left
            left, right = right, mixed
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

"""One safetensors file: its parts, and reading it, verified block by block (writing.py writes it). No torch.

    8 bytes header length | JSON header {key: dtype, shape, data_offsets; __metadata__} | data
    `------------- one hash, so that a header can be read alone -----------------------' `-- a hash per block

A key is `<logical tensor>@<offset>`, e.g. `weight/decoder.layers.3.mlp.router.weight@0,0`; the metadata holds the
global shapes. Any safetensors library opens these files.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from gpt4moe.checkpoint.block_cache import BlockCache
from gpt4moe.config.typed import FieldError, from_plain
from gpt4moe.errors import HEADER, MISSING, SIZE, CheckpointError, DamagedCheckpoint, UnreadableCheckpoint

if TYPE_CHECKING:
    from torch import Tensor

ITEM_BYTES = 4  # everything stored is F32
_FORGED = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""What a header of another content ends in."""
_MIB = 2**20
_READ_AHEAD_BYTES = 32 * _MIB
_CHUNK_BYTES = _MIB  # read, then hashed


@dataclass(frozen=True, slots=True)
class Piece:
    """A rectangle of a logical tensor, ready to be written."""

    tensor: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    values: "Tensor"
    """As many elements as `shape`, in C order; copied to the host as fp32 when the piece is written."""


@dataclass(frozen=True, slots=True)
class StoredPiece:
    """A rectangle of a logical tensor in a file."""

    file: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    start: int
    """First byte in the file's data."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FileEntry:
    """A file's size and hashes (xxh3, 64 bits, hex): enough to read and verify any part of it."""

    name: str
    size: int
    header_bytes: int
    header_hash: str
    block_bytes: int
    block_hashes: list[str]


def block_bytes_for(size: int) -> int:
    """16 MiB, so that a small slice costs little reading; 64 MiB in big files, so that a manifest stays small."""
    return 16 * _MIB if size < 4096 * _MIB else 64 * _MIB


class VerifiedFile:
    """Reads ranges of one file's data; every block is checked against its hash when it is read.

    Raises: CheckpointError when the file is missing, of another size or unreadable, or a hash is missing or differs.
    """

    def __init__(self, folder: Path, entry: FileEntry, cache: BlockCache):
        self.path, self.entry, self.cache = folder / entry.name, entry, cache
        size = self._size()
        if size != entry.size:
            what = f"has {size} bytes, its manifest says {entry.size}" if size >= 0 else "is missing"
            raise self._damaged(f"{self.path} {what}.", SIZE if size >= 0 else MISSING)
        is_possible = entry.block_bytes > 0 and entry.block_bytes % ITEM_BYTES == 0
        blocks = -(-self.data_bytes // entry.block_bytes) if is_possible else -1
        if blocks != len(entry.block_hashes):
            raise DamagedCheckpoint(
                folder, f"The manifest has {len(entry.block_hashes)} hashes for the {blocks} blocks of {self.path}."
            )

    def _size(self) -> int:
        """In bytes; -1: the file is missing."""
        try:
            # Not stat: NFS may answer with the size of seconds ago; an open file's is asked for again.
            file = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe of that name is not waited for
            try:
                return os.fstat(file).st_size
            finally:
                os.close(file)
        except (FileNotFoundError, NotADirectoryError):
            return -1
        except OSError as error:
            raise UnreadableCheckpoint(self.path, str(self.path), error) from error

    @property
    def data_bytes(self) -> int:
        return self.entry.size - self.entry.header_bytes

    def header(self, item_bytes: Mapping[str, int] | None = None) -> dict[str, Any]:
        """The JSON of the header: every entry has a dtype, a shape and a place in the data.

        Args:
            item_bytes: type -> bytes of an element; None: F32 alone.
        """
        data = self._checked(0, self.entry.header_bytes, self.entry.header_hash)
        try:
            parsed = json.loads(data[8:].tobytes())
            if not isinstance(parsed, dict):
                raise FieldError("it is not an object")
            for key, entry in parsed.items():
                if key != "__metadata__":
                    self._require_place(key, entry, item_bytes or {"F32": ITEM_BYTES})
        except _FORGED as error:
            raise self._not_written(error) from error
        return parsed

    def _require_place(self, key: str, entry: dict[str, Any], item_bytes: Mapping[str, int]) -> None:
        # By hand and not by from_plain: a checkpoint of thousands of ranks has millions of entries.
        dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        if any(type(number) is not int or number < 0 for number in (*shape, start, end)):
            raise FieldError(f"{key} has a shape or place that is no whole number")
        if end - start != prod(shape) * item_bytes[dtype] or end > self.data_bytes:
            raise FieldError(f"{key} lies at bytes {start} to {end} of {self.data_bytes}, which its shape contradicts")

    def _not_written(self, error: Exception) -> DamagedCheckpoint:
        """Without a place: the header's hash is right, so every reader finds this."""
        return DamagedCheckpoint(
            self.path.parent,
            f"The header of {self.path} is none that was written here ({type(error).__name__}: {error}).",
        )

    def pieces(self) -> list[tuple[str, tuple[int, ...], StoredPiece]]:
        """(logical tensor, its global shape, piece) for everything that the header lists."""
        header = self.header()
        try:
            return list(stored_pieces(header, self.entry.name))
        except _FORGED as error:
            raise self._not_written(error) from error

    def read(self, start: int, end: int) -> np.ndarray:
        """Bytes [start, end) of the data, uint8, not to be written to."""
        size = self.entry.block_bytes
        first, last = start // size, max(start, end - 1) // size
        if first == last:
            return self.block(first)[start - first * size : end - first * size]
        out = np.empty(end - start, dtype=np.uint8)
        for index in range(first, last + 1):
            low, high = max(start, index * size), min(end, (index + 1) * size)
            out[low - start : high - start] = self.block(index)[low - index * size : high - index * size]
        return out

    def read_floats(self, start: int, count: int) -> np.ndarray:
        return self.read(start, start + count * ITEM_BYTES).view(np.float32)

    def problems(self) -> Iterator[str]:
        """What is wrong with the file, block by block."""
        for index in range(len(self.entry.block_hashes)):
            try:
                self.block(index)
            except CheckpointError as error:
                yield error.cause

    def check(self, block: int) -> None:
        """Reads one block, or HEADER; SIZE and MISSING were looked at when this was made. Raises: CheckpointError."""
        if block == HEADER:
            self._checked(0, self.entry.header_bytes, self.entry.header_hash)
        elif block >= 0:
            self.block(block)

    def block_size(self, index: int) -> int:
        """Bytes of a block: the last one may be short."""
        return min(self.entry.block_bytes, self.data_bytes - index * self.entry.block_bytes)

    def block(self, index: int) -> np.ndarray:
        """Bytes of a block, uint8, not to be written to. Raises: CheckpointError."""
        block = self.cache.get((self.entry.name, index))
        if block is None:
            self.cache.make_room(size := self.block_size(index))
            block = np.empty(size, dtype=np.uint8)
            self.read_block(index, [(0, block)])
            self.cache.put((self.entry.name, index), block)
        return block

    def read_block(self, index: int, places: Iterable[tuple[int, np.ndarray]]) -> None:
        """Reads a block once, past the cache; bytes that have no place are read to be hashed. Raises: CheckpointError.

        Args:
            places: (first byte of the block, uint8 memory that takes it and those behind it), in ascending order.
        """
        start = self.entry.header_bytes + index * self.entry.block_bytes
        self._check_into(_without_gaps(places, self.block_size(index)), start, self.entry.block_hashes[index], index)

    def _checked(self, start: int, size: int, expected: str) -> np.ndarray:
        out = np.empty(size, dtype=np.uint8)
        self._check_into([out], start, expected)
        return out

    def _check_into(self, outs: Iterable[np.ndarray], start: int, expected: str, block: int = HEADER) -> None:
        what = f"{'The header' if block < 0 else f'Block {block}'} of {self.path}"
        try:
            ahead_bytes = self.block_size(block) + _READ_AHEAD_BYTES if block >= 0 else 0
            found = _read_hashed(self.path, start, outs, ahead_bytes)
        except OSError as error:
            raise UnreadableCheckpoint(self.path, what, error, block) from error
        if found != expected:
            raise self._damaged(f"{what} is damaged: its hash differs from the manifest's.", block)

    def _damaged(self, cause: str, block: int) -> DamagedCheckpoint:
        return DamagedCheckpoint(self.path.parent, cause, (self.path.name, block))


def _without_gaps(places: Iterable[tuple[int, np.ndarray]], size: int) -> Iterator[np.ndarray]:
    """Memory for all bytes of a block, one after the other; what no place takes is overwritten time and again."""
    at, nowhere = 0, np.empty(_CHUNK_BYTES, dtype=np.uint8)
    for low, memory in (*places, (size, nowhere[:0])):
        for gap in range(at, low, _CHUNK_BYTES):
            yield nowhere[: low - gap]
        yield memory
        at = low + len(memory)


def _read_hashed(path: Path, start: int, outs: Iterable[np.ndarray], ahead_bytes: int) -> str:
    """Bytes of the file from `start` on into memory. Returns: their hash; of fewer, where the file ends.

    A chunk is hashed while the processor still has it in its cache.
    Not by np.fromfile, which takes an error in the middle of a file for its end (numpy 2.4). Raises: OSError.

    Args:
        ahead_bytes: which the kernel is asked to fetch while the first of them are worked on.
    """
    found = xxhash.xxh3_64()
    with path.open("rb", buffering=0) as file:
        if ahead_bytes:
            with suppress(OSError):  # only advice: errors of the file are found by reading it
                os.posix_fadvise(file.fileno(), start, ahead_bytes, os.POSIX_FADV_WILLNEED)
        file.seek(start)
        for out in outs:
            left = out.data
            while left and (count := file.readinto(left[:_CHUNK_BYTES])):
                found.update(left[:count])
                left = left[count:]
    return found.hexdigest()


@dataclass(frozen=True, slots=True)
class _Shapes:
    shapes: dict[str, list[int]]


def stored_pieces(header: dict[str, Any], file: str) -> Iterator[tuple[str, tuple[int, ...], StoredPiece]]:
    """(logical tensor, its global shape, piece) for everything a file's header lists."""
    shapes = from_plain(_Shapes, {"shapes": json.loads(header["__metadata__"]["shapes"])}).shapes
    for key, entry in header.items():
        if key == "__metadata__":
            continue
        tensor, _, offset = key.rpartition("@")
        place = tuple(int(part) for part in offset.split(","))
        whole, shape = tuple(shapes[tensor]), tuple(entry["shape"])
        if not len(whole) == len(place) == len(shape) or any(
            o < 0 or o + n > g for o, n, g in zip(place, shape, whole, strict=True)
        ):
            raise FieldError(f"{key} of {list(shape)} is no part of {list(whole)}")
        start = entry["data_offsets"][0]
        if start % ITEM_BYTES:  # a number would lie in two blocks
            raise FieldError(f"{key} begins at byte {start}, amid a number")
        yield tensor, whole, StoredPiece(file, place, shape, start)

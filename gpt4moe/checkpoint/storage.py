"""One safetensors file: written as a stream with a hash per block, read back block by block and verified.

    8 bytes header length | JSON header {key: dtype, shape, data_offsets; __metadata__} | bytes

A key is `<logical tensor>@<offset>`, e.g. `weight/decoder.layers.3.mlp.router.weight@0,0`; the metadata holds the global
shapes. Any safetensors library opens these files.
"""

import json
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import xxhash
from torch import Tensor

from gpt4moe.errors import CheckpointError

BLOCK_BYTES = 16 * 2**20
_ITEM_BYTES = 4  # everything stored is F32


@dataclass(frozen=True, slots=True)
class Piece:
    """A rectangle of a logical tensor, ready to be written."""

    tensor: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    values: Tensor
    """fp32, as many elements as `shape`, in C order; copied to the CPU when its turn comes."""


@dataclass(frozen=True, slots=True)
class StoredPiece:
    """A rectangle of a logical tensor in a file."""

    file: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    start: int
    """First byte in the file."""


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A file's name, size and the xxh3 (64 bits, hex) of each of its blocks."""

    name: str
    size: int
    hashes: list[str]


def write_file(path: Path, pieces: list[Piece]) -> FileEntry:
    """Writes `pieces` and syncs; one piece at a time in host memory. Raises: OSError (a full disk, say)."""
    header: dict[str, Any] = {
        "__metadata__": {"shapes": json.dumps({piece.tensor: piece.global_shape for piece in pieces})}
    }
    end = 0
    for piece in pieces:
        start, end = end, end + prod(piece.shape) * _ITEM_BYTES
        key = f"{piece.tensor}@{','.join(map(str, piece.offset))}"
        header[key] = {"dtype": "F32", "shape": piece.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        hashed = _HashingWriter(file)
        hashed.write(struct.pack("<Q", len(text)))
        hashed.write(text)
        for piece in pieces:
            array = piece.values.detach().to("cpu", torch.float32).contiguous().numpy()
            hashed.write(memoryview(array.reshape(-1)).cast("B"))
        hashes = hashed.finish()
        file.flush()
        os.fsync(file.fileno())
    return FileEntry(path.name, path.stat().st_size, hashes)


class _HashingWriter:
    """Passes bytes on to a file and hashes them block by block."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.hashes: list[str] = []
        self.current = xxhash.xxh3_64()
        self.room = BLOCK_BYTES

    def write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view.nbytes:
            part, view = view[: self.room], view[self.room :]
            self.file.write(part)
            self.current.update(part)
            self.room -= part.nbytes
            if not self.room:
                self._end_block()

    def _end_block(self) -> None:
        self.hashes.append(self.current.hexdigest())
        self.current, self.room = xxhash.xxh3_64(), BLOCK_BYTES

    def finish(self) -> list[str]:
        if self.room < BLOCK_BYTES:
            self._end_block()
        return self.hashes


class VerifiedFile:
    """Reads ranges of one file; every block is checked against its hash when it is first touched.

    Keeps the last block read, so host memory is one block.
    Raises: CheckpointError when the file is missing, of another size, or a block's hash differs.
    """

    def __init__(self, folder: Path, entry: FileEntry):
        self.path, self.entry = folder / entry.name, entry
        size = self.path.stat().st_size if self.path.exists() else -1
        if size != entry.size:
            raise CheckpointError(
                f"{self.path} has {size} bytes, its manifest says {entry.size}."
                if size >= 0
                else f"{self.path} is missing.",
                "Take another checkpoint of the run: this one is damaged.",
            )
        self.block: tuple[int, bytes] = (-1, b"")

    def header(self) -> dict[str, Any]:
        (length,) = struct.unpack("<Q", self.read(0, 8))
        parsed = json.loads(self.read(8, 8 + length))
        assert isinstance(parsed, dict)
        return parsed

    def read(self, start: int, end: int) -> bytes:
        first, last = start // BLOCK_BYTES, max(start, end - 1) // BLOCK_BYTES
        if first == last:
            return self._block(first)[start - first * BLOCK_BYTES : end - first * BLOCK_BYTES]
        parts = [self._block(index) for index in range(first, last + 1)]
        return b"".join(parts)[start - first * BLOCK_BYTES : end - first * BLOCK_BYTES]

    def read_floats(self, start: int, count: int) -> np.ndarray:
        return np.frombuffer(self.read(start, start + count * _ITEM_BYTES), dtype=np.float32)

    def verify(self) -> None:
        """Checks every block."""
        for index in range(len(self.entry.hashes)):
            self._block(index)

    def _block(self, index: int) -> bytes:
        if self.block[0] != index:
            with self.path.open("rb") as file:
                file.seek(index * BLOCK_BYTES)
                data = file.read(BLOCK_BYTES)
            if xxhash.xxh3_64(data).hexdigest() != self.entry.hashes[index]:
                raise CheckpointError(
                    f"Block {index} of {self.path} is damaged: its hash differs from the manifest's.",
                    "Take another checkpoint of the run.",
                )
            self.block = (index, data)
        return self.block[1]


def stored_pieces(
    header: dict[str, Any], file: str, data_start: int
) -> Iterator[tuple[str, tuple[int, ...], StoredPiece]]:
    """(logical tensor, its global shape, piece) for everything a file's header lists."""
    shapes = json.loads(header["__metadata__"]["shapes"])
    for key, entry in header.items():
        if key == "__metadata__":
            continue
        tensor, _, offset = key.rpartition("@")
        place = tuple(int(part) for part in offset.split(","))
        start = data_start + entry["data_offsets"][0]
        yield tensor, tuple(shapes[tensor]), StoredPiece(file, place, tuple(entry["shape"]), start)


def data_start(file: VerifiedFile) -> int:
    (length,) = struct.unpack("<Q", file.read(0, 8))
    return 8 + int(length)

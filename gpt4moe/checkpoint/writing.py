"""Writing one safetensors file (storage) as a stream, with a hash per block. No torch."""

import json
import os
import struct
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from gpt4moe.checkpoint.storage import ITEM_BYTES, FileEntry, Piece, block_bytes_for
from gpt4moe.errors import CheckpointError

_MIB = 2**20
_STREAM_BYTES = _MIB  # xxhash keeps the interpreter's lock: 0.3 ms at a time lets the training thread run
_SYNC_BYTES = 1024 * _MIB  # one fsync of hundreds of GB would look like a disk that stands still


def write_file(
    path: Path, pieces: list[Piece], block_bytes: int | None = None, *, moved: Callable[[], None] = lambda: None
) -> FileEntry:
    """Writes `pieces` and syncs; one piece at a time in host memory.

    Args: moved: called before the file is made, and whenever the disk has answered. What it raises ends the writing.

    Raises: OSError, for example on a full disk; CheckpointError when two pieces have the same place.
    """
    header, end = pieces_header(path, pieces)
    moved()
    with path.open("wb") as file:
        moved()
        data = HashingWriter(file, header, block_bytes or block_bytes_for(end), moved)
        for piece in pieces:
            array = piece.values.detach().cpu().float().contiguous().numpy()
            data.write(memoryview(array.reshape(-1)).cast("B"))
        return data.finish(path.name)


def pieces_header(path: Path, pieces: list[Piece]) -> tuple[bytes, int]:
    """(header, bytes of data) of a file of these pieces. Raises: CheckpointError when two pieces have the same
    place."""
    layout: dict[str, Any] = {
        "__metadata__": {"shapes": json.dumps({piece.tensor: piece.global_shape for piece in pieces})}
    }
    end = 0
    for piece in pieces:
        start, end = end, end + prod(piece.shape) * ITEM_BYTES
        key = f"{piece.tensor}@{','.join(map(str, piece.offset))}"
        if key in layout:
            raise CheckpointError(
                f"{path} would hold {key} twice.", "This is a mistake in the program: please report it."
            )
        layout[key] = {"dtype": "F32", "shape": piece.shape, "data_offsets": [start, end]}
    return encoded_header(layout), end


def encoded_header(layout: dict[str, Any]) -> bytes:
    """A safetensors file's first bytes: the length of the JSON, and the JSON padded to eight bytes."""
    text = json.dumps(layout).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


class HashingWriter:
    """Writes a header, then passes bytes on to the file and hashes them block by block; syncs every GiB."""

    def __init__(self, file: BinaryIO, header: bytes, block_bytes: int, moved: Callable[[], None] = lambda: None):
        file.write(header)
        self.file, self.header, self.moved = file, header, moved
        self.size = len(header)
        self.block_bytes = block_bytes
        self.hashes: list[str] = []
        self.current = xxhash.xxh3_64()
        self.room = block_bytes
        self.unsynced = 0

    def write(self, view: memoryview) -> None:
        while view.nbytes:
            size = min(self.room, _STREAM_BYTES)
            part, view = view[:size], view[size:]
            self.file.write(part)
            self.unsynced += part.nbytes
            if self.unsynced >= _SYNC_BYTES:
                self._sync()
            self.moved()
            self.current.update(part)
            self.room -= part.nbytes
            self.size += part.nbytes
            if not self.room:
                self._end_block()

    def _sync(self) -> None:
        self.file.flush()
        os.fdatasync(self.file.fileno())
        self.unsynced = 0

    def _end_block(self) -> None:
        # The kernel begins to write these pages now, so that a sync waits for few.
        written = self.block_bytes - self.room
        os.posix_fadvise(self.file.fileno(), self.size - written, written, os.POSIX_FADV_DONTNEED)
        self.hashes.append(self.current.hexdigest())
        self.current, self.room = xxhash.xxh3_64(), self.block_bytes

    def finish(self, name: str) -> FileEntry:
        """Syncs the file, named `name`. Returns its size and hashes."""
        if self.room < self.block_bytes:
            self._end_block()
        self.file.flush()
        os.fsync(self.file.fileno())
        self.moved()
        return FileEntry(
            name=name,
            size=self.size,
            header_bytes=len(self.header),
            header_hash=xxhash.xxh3_64_hexdigest(self.header),
            block_bytes=self.block_bytes,
            block_hashes=self.hashes,
        )

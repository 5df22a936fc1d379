"""Pieces -> shards of Megatron's format. What a shard holds depends on the documents alone.

    piece 0 | piece 1 | ...   without duplicates   -->   train-00000.{bin,idx,sums}, train-00001...

A shard ends with the document that passes its size. Shards are written by several processes. Each is whole once its
.json is there; a piece's tokens are removed when the shards that need them are whole.
"""

import dataclasses
import hashlib
import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from gpt4moe.config.checksums import file_sha256
from gpt4moe.corpus.duplicates import KEY_BYTES
from gpt4moe.corpus.piece import PieceFacts, piece_path, write_in_steps
from gpt4moe.corpus.records import Advance
from gpt4moe.data.blocks import BLOCK_BYTES, INDEX_BLOCK_BYTES, hash_blocks
from gpt4moe.data.indexed_writer import write_index
from gpt4moe.data.manifest import SPLITS, Shard, write_json
from gpt4moe.durable import sync_file, sync_folder
from gpt4moe.errors import DataError

STAYS = "stays"
"""File of duplicates.mark_first, where duplicates are removed."""
_CHUNK = 32 * BLOCK_BYTES


@dataclass(frozen=True, slots=True)
class ShardTask:
    """A shard to write: documents `first` of piece `first_piece` up to `last` of `last_piece`, without that one."""

    split: str
    number: int
    first_piece: int
    first: int
    last_piece: int
    last: int

    @property
    def name(self) -> str:
        return f"{self.split}-{self.number:05}"


class Documents:
    """Which documents of the pieces stay, split by split.

    Args:
        counts: documents of each piece in both splits.
    """

    def __init__(self, work: Path, counts: Sequence[int]):
        self.work = work
        self.starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        path = work / STAYS
        has_some = path.exists() and path.stat().st_size > 0  # of no document, nothing can be mapped
        self.stays: NDArray[np.uint8] | None = np.memmap(path, mode="r", dtype=np.uint8) if has_some else None

    @property
    def num_duplicates(self) -> int:
        """Documents that do not stay."""
        stays = self.stays[: self.starts[-1]] if self.stays is not None else np.ones(0)
        return int(np.count_nonzero(stays == 0))

    def lengths(self, piece: int, split: str) -> NDArray[np.int64]:
        """Tokens of each document of a piece, also of those that do not stay."""
        return np.fromfile(piece_path(self.work, piece, f"{split}.lengths"), dtype="<u4").astype(np.int64)

    def chosen(self, piece: int, split: str) -> NDArray[np.bool_] | None:
        """Which of them stay; None: all."""
        if self.stays is None:
            return None
        splits = np.fromfile(piece_path(self.work, piece, "splits"), dtype=np.uint8)
        stays = self.stays[self.starts[piece] : self.starts[piece + 1]]
        chosen: NDArray[np.bool_] = stays[splits & 1 == SPLITS.index(split)] == 1
        return chosen

    def count(self, split: str) -> int:
        """How many stay."""
        pieces = range(len(self.starts) - 1)
        chosen = ((self.chosen(piece, split), piece) for piece in pieces)
        return sum(len(self.lengths(piece, split)) if stays is None else int(stays.sum()) for stays, piece in chosen)

    def kept(self, facts: Sequence[PieceFacts]) -> tuple[dict[str, int], int]:
        """Bytes of the documents that stay, split by split, and how many of those have their middle last."""
        sums, filled = dict.fromkeys(SPLITS, 0), 0
        for piece, one in enumerate(facts):
            if self.stays is None:
                sums = {split: sums[split] + one.bytes[split] for split in SPLITS}
                filled += one.filled
                continue
            kinds = np.fromfile(piece_path(self.work, piece, "splits"), dtype=np.uint8)
            sizes = np.fromfile(piece_path(self.work, piece, "sizes"), dtype="<u4")
            stays = self.stays[self.starts[piece] : self.starts[piece + 1]] == 1
            filled += int(np.count_nonzero(stays & (kinds >= 2)))
            for number, split in enumerate(SPLITS):
                sums[split] += int(sizes[stays & (kinds & 1 == number)].sum(dtype=np.int64))
        return sums, filled


def write_keys(documents: Documents, path: Path) -> dict[str, Any]:
    """Writes the keys of the documents that stay, with which a later command finds their duplicates.

    Returns: the file's entry in the manifest.
    """
    assert documents.stays is not None
    count = 0
    with path.open("wb") as stream:
        for piece in range(len(documents.starts) - 1):
            keys = np.fromfile(piece_path(documents.work, piece, "keys"), dtype=f"V{KEY_BYTES}")
            kept = keys[documents.stays[documents.starts[piece] : documents.starts[piece + 1]] == 1]
            stream.write(kept.tobytes())
            count += len(kept)
    return {"file": path.name, "documents": count, "sha256": file_sha256(path)}


def plan_shards(
    documents: Documents, split: str, *, itemsize: int, shard_bytes: int, number: int = 0
) -> list[ShardTask]:
    """Where shards begin and end. Empty: the split has no document.

    Args:
        number: of the first shard.
    """
    tasks: list[ShardTask] = []
    begin: tuple[int, int] | None = None
    size = piece = end = 0
    for piece in range(len(documents.starts) - 1):
        lengths = documents.lengths(piece, split) * itemsize
        chosen = documents.chosen(piece, split)
        if chosen is not None:
            lengths = np.where(chosen, lengths, 0)
        sums, start = np.cumsum(lengths), 0
        while start < len(lengths):
            if begin is None:
                begin = (piece, start)
            before = int(sums[start - 1]) if start else 0
            end = int(np.searchsorted(sums, shard_bytes - size + before)) + 1
            if end > len(lengths):
                size += int(sums[-1]) - before
                break
            tasks.append(ShardTask(split, number + len(tasks), *begin, piece, end))
            begin, size, start = None, 0, end
    if begin is not None and size:
        tasks.append(ShardTask(split, number + len(tasks), *begin, piece, len(documents.lengths(piece, split))))
    return tasks


def write_shard(folder: Path, task: ShardTask, documents: Documents, dtype: str, advance: Advance) -> None:
    """Writes a shard into `folder`, and its entry of the manifest beside the pieces."""
    itemsize = np.dtype(dtype).itemsize
    path = folder / f"{task.name}.bin"
    lengths: list[NDArray[np.int64]] = []
    with path.open("wb") as stream:
        hashed = _Hashed(stream)
        for piece in range(task.first_piece, task.last_piece + 1):
            lengths.append(_copy(task, piece, documents, itemsize, hashed, advance))
        hashed.close()
        stream.flush()
        os.fsync(stream.fileno())
    flat = np.concatenate(lengths)
    index = folder / f"{task.name}.idx"
    write_index(index, flat, np.dtype(dtype))
    idx_sha256, of_index = hash_blocks(index, INDEX_BLOCK_BYTES)
    sums = folder / f"{task.name}.sums"
    sums.write_bytes(np.array([*hashed.blocks, *of_index], dtype="<u4").tobytes())
    for written in (sums, index):
        sync_file(written)
    sync_folder(folder)  # before its .json: the tokens that a shard is made of are removed after that
    shard = Shard(
        file=task.name, sums=f"{task.name}.sums", documents=len(flat), tokens=int(flat.sum()), dtype=dtype,
        bin_sha256=hashed.digest.hexdigest(), idx_bytes=index.stat().st_size, idx_sha256=idx_sha256,
        idx_blocks=len(of_index),
    )  # fmt: skip
    write_json(shard_json(documents.work, task), dataclasses.asdict(shard))


def shard_json(work: Path, task: ShardTask) -> Path:
    return work / f"shard-{task.name}.json"


def read_shard(work: Path, task: ShardTask) -> Shard:
    return Shard(**json.loads(shard_json(work, task).read_text(encoding="utf-8")))


def _copy(
    task: ShardTask, piece: int, documents: Documents, itemsize: int, out: "_Hashed", advance: Advance
) -> NDArray[np.int64]:
    """Tokens of a shard's documents in one piece. Returns: their lengths."""
    lengths, chosen = documents.lengths(piece, task.split), documents.chosen(piece, task.split)
    first = task.first if piece == task.first_piece else 0
    last = task.last if piece == task.last_piece else len(lengths)
    ends = np.concatenate([[0], np.cumsum(lengths)]) * itemsize
    if chosen is None:
        runs = [(first, last)] if last > first else []
    else:
        edges = np.flatnonzero(np.diff(np.concatenate([[False], chosen[first:last], [False]]).astype(np.int8)))
        runs = [(first + int(a), first + int(b)) for a, b in edges.reshape(-1, 2)]
    if runs:
        path = piece_path(documents.work, piece, f"{task.split}.tokens")
        with path.open("rb") as stream:
            for start, stop in runs:
                stream.seek(int(ends[start]))
                left = int(ends[stop] - ends[start])
                while left:
                    data = stream.read(min(left, _CHUNK))
                    if not data:
                        raise DataError(f"{path} is shorter than it was.", f"Remove {documents.work}, and begin anew.")
                    out.write(data)
                    left -= len(data)
                    advance(len(data))
    kept = lengths[first:last]
    return kept if chosen is None else kept[chosen[first:last]]


class _Hashed:
    """Writes a .bin, with its sha256 and the checksum of each block."""

    def __init__(self, stream: BinaryIO):
        self.stream, self.digest = stream, hashlib.sha256()
        self.blocks: list[int] = []
        self._rest = bytearray()

    def write(self, data: bytes) -> None:
        if not self._rest and len(data) % BLOCK_BYTES == 0:
            self._out(data)
            return
        self._rest += data
        if len(self._rest) >= _CHUNK:
            whole = len(self._rest) // BLOCK_BYTES * BLOCK_BYTES
            self._out(bytes(self._rest[:whole]))
            del self._rest[:whole]

    def close(self) -> None:
        self._out(bytes(self._rest))

    def _out(self, data: bytes) -> None:
        self.digest.update(data)
        view = memoryview(data)
        self.blocks += [zlib.crc32(view[start : start + BLOCK_BYTES]) for start in range(0, len(data), BLOCK_BYTES)]
        write_in_steps(self.stream, data)

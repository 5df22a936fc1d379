"""Images of a source on disk: their own bytes in shards, hashes checked as they are read; and where they stand in text.

    train-images-00000.img     encoded images one after the other, each distinct one once
    train-images-00000.table   a record for each: where it lies, its size, its sha256
    train-00000.frames         a record for each frame: the image token that it is of, in train-00000.bin, and its image

A clip is several frames at one image token. Images are numbered through all shards of their split. No file is pickled;
all are plain records that numpy maps.
"""

import hashlib
from array import array
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gpt4moe.config.checksums import file_sha256
from gpt4moe.data.blocks import restore
from gpt4moe.data.manifest import FrameTable, ImageShard
from gpt4moe.data.shards import require_size
from gpt4moe.errors import DataError

IMAGE = np.dtype([("start", "<u8"), ("bytes", "<u4"), ("width", "<u4"), ("height", "<u4"), ("sha256", "V32")])
FRAME = np.dtype([("token", "<u8"), ("image", "<u8")])
_MOST_MAPPED = 128
_MADE_BY = "tools/prepare_media.py"
_RESTORE = restore(_MADE_BY)


class ImageWriter:
    """The images of a split that are being written.

    Args:
        prefix: path of the shards' names before their number.
        shard_bytes: of a .img; a shard ends with the image that passes it.
    """

    def __init__(self, prefix: Path, shard_bytes: int):
        self.prefix, self.shard_bytes = prefix, shard_bytes
        self.shards: list[ImageShard] = []
        self.numbers: dict[bytes, int] = {}
        """sha256 of each image -> its number: about 150 bytes of memory an image."""
        self._records: list[tuple[int, int, int, int, bytes]] = []
        self._size = 0
        self._stream = self._path(".img").open("wb")

    def add(self, data: bytes, size: tuple[int, int]) -> int:
        """Returns: the number of the image, an earlier one of the same bytes' too. size: width, height."""
        digest = hashlib.sha256(data).digest()
        if digest in self.numbers:
            return self.numbers[digest]
        self.numbers[digest] = number = len(self.numbers)
        self._stream.write(data)
        self._records.append((self._size, len(data), *size, digest))
        self._size += len(data)
        if self._size >= self.shard_bytes:
            self._close()
            self._stream = self._path(".img").open("wb")
        return number

    def finish(self) -> list[ImageShard]:
        """The manifest's entries."""
        if self._records:
            self._close()
        else:
            self._stream.close()
            self._path(".img").unlink()
        return self.shards

    def _close(self) -> None:
        self._stream.close()
        table = self._path(".table")
        table.write_bytes(np.array(self._records, dtype=IMAGE).tobytes())
        self.shards.append(
            ImageShard(
                file=table.stem, images=len(self._records), bytes=self._size, table_sha256=file_sha256(table)
            )
        )  # fmt: skip
        self._records, self._size = [], 0

    def _path(self, suffix: str) -> Path:
        return self.prefix.with_name(f"{self.prefix.name}-{len(self.shards):05}{suffix}")


def write_frames(path: Path, frames: "array[int]") -> FrameTable:
    """The table of a shard of tokens.

    Args:
        frames: of each frame its token in the shard and the number of its image ("Q"); tokens never fall.
    Returns: the manifest's entry.
    """
    records = np.frombuffer(frames, dtype=np.uint64).astype("<u8").view(FRAME)
    path.write_bytes(records.tobytes())
    return FrameTable(
        file=path.name, images=len(np.unique(records["token"])), frames=len(records), sha256=file_sha256(path)
    )


class ImageStore:
    """The images of a split by their numbers.

    Args:
        folder: of the source.
    Raises: DataError for a file that is missing or of another size than the manifest says.
    """

    def __init__(self, folder: Path, shards: Sequence[ImageShard]):
        self.folder, self.shards = folder, shards
        for shard in shards:
            require_size(folder / f"{shard.file}.img", shard.bytes, _MADE_BY)
            require_size(folder / f"{shard.file}.table", shard.images * IMAGE.itemsize, _MADE_BY)
        self.ends = list(accumulate(shard.images for shard in shards))
        self._mapped = lru_cache(maxsize=_MOST_MAPPED)(self._map)

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def where(self, number: int) -> str:
        """The shard of an image and its number there, for errors."""
        at, within = self._place(number)
        return f"{self.folder / f'{self.shards[at].file}.img'}: image {within}"

    def sha256(self, number: int) -> bytes:
        """Of an image's file, by the table. Raises: DataError for a damaged table."""
        at, within = self._place(number)
        return bytes(self._mapped(at)[0][within]["sha256"])

    def read(self, number: int) -> bytes:
        """The bytes of an image, as its file was. Raises: DataError when they are not those that were written."""
        at, within = self._place(number)
        table, content = self._mapped(at)
        start, size = int(table[within]["start"]), int(table[within]["bytes"])
        data = content[start : start + size].tobytes()
        # Of every read: it costs a tenth of decoding, and needs no memory of what was checked.
        if hashlib.sha256(data).digest() != bytes(table[within]["sha256"]):
            raise damaged_image(self.folder / f"{self.shards[at].file}.img", within, start)
        return data

    def _place(self, number: int) -> tuple[int, int]:
        """Its shard, its number there."""
        at = bisect_right(self.ends, number)
        return at, number - self.ends[at] + self.shards[at].images

    def _map(self, at: int) -> tuple[NDArray[np.void], NDArray[np.uint8]]:
        shard = self.shards[at]
        path = self.folder / f"{shard.file}.table"
        _require_hash(path, shard.table_sha256)
        if not shard.images:
            return np.empty(0, dtype=IMAGE), np.empty(0, dtype=np.uint8)
        try:
            return (
                np.memmap(path, mode="r", dtype=IMAGE),
                np.memmap(path.with_suffix(".img"), mode="r", dtype=np.uint8),
            )
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}.", "Mount it again, and resume.") from error


class FrameStream:
    """The frames of a split, in the order of its tokens.

    Args:
        folder: of the source.
        ends: tokens up to the end of each shard of tokens.
    Raises: DataError for a file that is missing or of another size, or tables of other tokens.
    """

    def __init__(self, folder: Path, tables: Sequence[FrameTable], ends: Sequence[int]):
        if len(tables) != len(ends):
            raise DataError(f"{folder} has {len(tables)} tables of frames for {len(ends)} shards.", _RESTORE)
        self.folder, self.tables, self.ends = folder, tables, ends
        for table in tables:
            require_size(folder / table.file, table.frames * FRAME.itemsize, _MADE_BY)
        self._mapped = lru_cache(maxsize=_MOST_MAPPED)(self._map)

    def between(self, start: int, stop: int) -> NDArray[np.void]:
        """Records of FRAME of the tokens start to stop - 1 of the stream, which are all of one shard; their tokens are
        counted from `start`. Raises: DataError for a damaged table."""
        at = bisect_right(self.ends, start)
        before = self.ends[at - 1] if at else 0
        table = self._mapped(at)
        first, last = np.searchsorted(table["token"], [start - before, stop - before])
        found = table[first:last].copy()
        found["token"] -= start - before
        return found

    def tokens_and_lengths(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The place of each image token in the stream, ascending, and how many frames stand there."""
        tokens, lengths = [], []
        for at, end in enumerate(self.ends):
            before = self.ends[at - 1] if at else 0
            found, count = np.unique(self._mapped(at)["token"], return_counts=True)
            assert not len(found) or int(found[-1]) < end - before, "a table of other tokens has another hash"
            tokens.append(found.astype(np.int64) + before)
            lengths.append(count.astype(np.int64))
        return np.concatenate(tokens), np.concatenate(lengths)

    def _map(self, at: int) -> NDArray[np.void]:
        table = self.tables[at]
        path = self.folder / table.file
        _require_hash(path, table.sha256)
        return np.memmap(path, mode="r", dtype=FRAME) if table.frames else np.empty(0, dtype=FRAME)


def verify_images(folder: Path, shard: ImageShard, progress: Callable[[int], None]) -> list[str]:
    """What is wrong with a shard: every image is read.

    Args:
        progress: called with the number of bytes just read.
    """
    found = []
    try:
        store = ImageStore(folder, [shard])
        for number in range(len(store)):
            try:
                progress(len(store.read(number)))
            except DataError as error:
                found.append(error.cause)
    except DataError as error:
        return [error.cause]
    return found


def damaged_image(path: Path, within: int, start: int) -> DataError:
    return DataError(f"{path} is damaged: image {within}, at byte {start:,}, has another sha256.", _RESTORE)


def _require_hash(path: Path, sha256: str) -> None:
    if file_sha256(path) != sha256:
        raise DataError(f"{path} is damaged: its sha256 is not the manifest's.", _RESTORE)

"""The tokens of one split of a source: its shards one after the other, mapped when they are first read.

    stream   shard 0 | shard 1 | ...          any stretch of it may be read, also across shards
    .sums    CRC-32 of every block of a .bin and its .idx; a block is checked before it is used (blocks.py)

Opening thousands of shards costs one look at the size of each file. Nothing else is read until a sample is asked for.
"""

import resource
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gpt4moe.config.checksums import file_sha256
from gpt4moe.data.blocks import BLOCK_BYTES, INDEX_BLOCK_BYTES, Blocks, hash_blocks, num_blocks, restore
from gpt4moe.data.indexed import DocumentIndex
from gpt4moe.data.manifest import Shard
from gpt4moe.errors import DataError

TEXT_COMMAND = "tools/tokenize_corpus.py"
_NEGATIVE = 1 << 63
_MOST_MAPPED = 128
"""Shards of a source that are mapped at once: each takes up to three of the files that a process may open."""


class ShardedTokens:
    """A stream of tokens, as an array: it has a length, and gives slices.

    Args:
        folder: of the source.
        made_by: the command that makes such a source, for errors.
    Raises: DataError for a file that is missing or has another size than the manifest says.
    """

    def __init__(self, folder: Path, shards: Sequence[Shard], made_by: str = TEXT_COMMAND):
        self.folder, self.shards, self.made_by = folder, shards, made_by
        for shard in shards:
            require_files(folder, shard, made_by)
        self.ends = list(accumulate(shard.tokens for shard in shards))
        """Tokens up to the end of each shard."""
        self._mapped = lru_cache(maxsize=_MOST_MAPPED)(self._map)
        self._index = lru_cache(maxsize=_MOST_MAPPED)(self._map_index)
        self._whole_indexes: set[int] = set()
        """Shards of an older tool, without sums of the index, whose index was hashed: one that is mapped again, among
        thousands, is not read once more."""

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, stretch: slice) -> NDArray[np.integer]:
        """A copy of a stretch. Raises: DataError for a damaged block."""
        parts = [self._mapped(at).read(start, stop) for at, start, stop in self._parts(stretch)]
        if not parts:
            return np.empty(0, dtype=self.shards[0].dtype)
        return np.concatenate(parts) if len(parts) > 1 else parts[0]

    def read_into(self, start: int, tokens: NDArray[np.int64], labels: NDArray[np.int64]) -> int:
        """Writes the S tokens from `start` on into `tokens` [S], and the token after each of them into `labels` [S].

        Returns: a number that no token of these is above; more than any vocabulary when one is negative.
        Raises: IndexError before the begin or beyond the end; DataError for a damaged block.
        """
        stop = start + len(tokens) + 1
        at = bisect_right(self.ends, start)
        if start >= 0 and at < len(self.ends) and stop <= self.ends[at]:
            mapped, before = self._mapped(at), self.ends[at] - self.shards[at].tokens
            found, largest = mapped.checked(start - before, stop - before), mapped.largest
        elif start >= 0 and stop <= len(self):
            found = self[start:stop]
            largest = _largest(found)
        else:
            raise IndexError(f"tokens {start} to {stop - 1} of {len(self)}")
        tokens[:] = found[:-1]
        labels[:] = found[1:]
        return largest

    def document_starts(self, stretch: slice) -> NDArray[np.int64]:
        """Where in a stretch documents begin, ascending, each place once. Reads as `begins` does."""
        found, first = [], stretch.start
        for at, start, stop in self._parts(stretch):
            before = self.ends[at] - self.shards[at].tokens
            found.append(self._index(at).starts(start, stop) + (before - first))
        places = np.concatenate(found)
        return places[np.diff(places, prepend=-1) > 0]

    def begins(self, stretch: slice) -> NDArray[np.bool_]:
        """Of each token of a stretch whether it is the first of a document. Reads the indexes alone.

        Raises: DataError for an index that is not that of its shard.
        """
        parts = []
        for at, start, stop in self._parts(stretch):
            part = np.zeros(stop - start, dtype=np.bool_)
            part[self._index(at).starts(start, stop) - start] = True
            parts.append(part)
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.bool_)

    def _parts(self, stretch: slice) -> Iterator[tuple[int, int, int]]:
        """Of each shard that a stretch touches: which one, and the first token and the last + 1 there."""
        start, stop, step = stretch.indices(len(self))
        assert step == 1, "a stretch has no gaps"
        while start < stop:
            at = bisect_right(self.ends, start)
            before = self.ends[at] - self.shards[at].tokens
            until = min(stop, self.ends[at])
            yield at, start - before, until - before
            start = until

    def place(self, position: int) -> tuple[Shard, int]:
        """The shard of a token, and its place there."""
        at = bisect_right(self.ends, position)
        return self.shards[at], position - self.ends[at] + self.shards[at].tokens

    def origin(self, position: int) -> str:
        """Where a token lies, for a person: the file, the place in it, the document. Raises: DataError, as `index`."""
        shard, token = self.place(position)
        document, within = self.index(self.shards.index(shard)).document_at(token)
        return f"{bin_path(self.folder, shard)}, token {token:,} (document {document:,}, its token {within:,})"

    def index(self, at: int) -> DocumentIndex:
        """Where the documents of a shard begin. Raises: DataError for an index that is not that of its shard."""
        return self._index(at)

    def _map_index(self, at: int) -> DocumentIndex:
        shard, path = self.shards[at], idx_path(self.folder, self.shards[at])
        with self._reading():
            require_size(path, shard.idx_bytes, self.made_by)
            index = DocumentIndex(self.folder / shard.file)
        if index.num_tokens != shard.tokens or index.num_documents != shard.documents:
            raise DataError(
                f"{path} is of other data: it has {index.num_documents:,} documents and {index.num_tokens:,} tokens, "
                f"the manifest says {shard.documents:,} and {shard.tokens:,}.",
                restore(self.made_by),
            )
        if shard.idx_blocks:
            index.check_as_read(self._mapped(at).index_sums, self.made_by)
        elif at not in self._whole_indexes:
            with self._reading():
                is_whole = file_sha256(path) == shard.idx_sha256
            if not is_whole:
                raise DataError(f"{path} is damaged: its sha256 is not the manifest's.", restore(self.made_by))
            self._whole_indexes.add(at)
        return index

    def _map(self, at: int) -> "_MappedShard":
        with self._reading():
            return _MappedShard(self.folder, self.shards[at], self.made_by)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        _allow_open_files()
        try:
            yield
        except OSError as error:
            raise DataError(
                f"{error.filename or self.folder} cannot be read: {error.strerror}.", "Mount it again, and resume."
            ) from error


@lru_cache(maxsize=1)
def _allow_open_files() -> None:
    """As many open files as the system lets this process have: 13T tokens are some thousand, and 1024 a usual limit."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


class _MappedShard:
    """One .bin, and its sums with those of its index."""

    def __init__(self, folder: Path, shard: Shard, made_by: str):
        path = bin_path(folder, shard)
        # Plain views: slices of numpy's own class for mapped files cost several times as much.
        content: NDArray[np.uint8] = np.asarray(np.memmap(path, mode="r", dtype=np.uint8))
        self.dtype = np.dtype(shard.dtype)
        num_bytes = len(content) // self.dtype.itemsize * self.dtype.itemsize  # a file that was cut fails its checks
        self.tokens: NDArray[np.integer] = content[:num_bytes].view(self.dtype)
        sums: NDArray[np.uint32] = np.asarray(np.memmap(sums_path(folder, shard), mode="r", dtype="<u4"))
        count = len(sums) - shard.idx_blocks
        self.blocks = Blocks(path, content, sums[:count], BLOCK_BYTES, made_by, self._see)
        self.index_sums = sums[count:]
        self.largest = 0
        """Of the tokens of these blocks; more than any vocabulary when one is negative."""

    def read(self, start: int, stop: int) -> NDArray[np.integer]:
        """Tokens start to stop - 1, copied. Raises: DataError."""
        return self.checked(start, stop).copy()

    def checked(self, start: int, stop: int) -> NDArray[np.integer]:
        """A view of tokens start to stop - 1. Raises: DataError."""
        self.blocks.require(start * self.dtype.itemsize, stop * self.dtype.itemsize)
        return self.tokens[start:stop]

    def _see(self, block: NDArray[np.uint8]) -> None:
        self.largest = max(self.largest, _largest(block.view(self.dtype)))


def _largest(tokens: NDArray[np.integer]) -> int:
    """The largest token; when one is negative, a number that is more than any vocabulary."""
    return int(tokens.max()) if tokens.min() >= 0 else _NEGATIVE


def require_files(folder: Path, shard: Shard, made_by: str = TEXT_COMMAND) -> None:
    """Raises: DataError when a file of the shard is missing or has another size than the manifest says."""
    num_bytes = shard.tokens * np.dtype(shard.dtype).itemsize
    require_size(bin_path(folder, shard), num_bytes, made_by)
    require_size(idx_path(folder, shard), shard.idx_bytes, made_by)
    num_sums = num_blocks(num_bytes, BLOCK_BYTES) + shard.idx_blocks
    require_size(sums_path(folder, shard), 4 * num_sums, made_by)


def require_size(path: Path, size: int, made_by: str) -> None:
    """Raises: DataError when a file of a source is missing or has another size than the manifest says."""
    try:
        found = path.stat().st_size
    except OSError as error:
        raise DataError(f"{path} is missing.", restore(made_by)) from error
    if found != size:
        raise DataError(f"{path} has {found:,} bytes, the manifest says {size:,}.", restore(made_by))


def describe(prefix: Path, sums: Path, *, file: str, documents: int, tokens: int, dtype: str) -> Shard:
    """The manifest's entry of a pair of files that is written; reads them once, and writes `sums`.

    Args:
        prefix: path without .bin and .idx.
        file: Shard.file.
    """
    index = Path(f"{prefix}.idx")
    bin_sha256, of_bin = hash_blocks(Path(f"{prefix}.bin"), BLOCK_BYTES)
    idx_sha256, of_index = hash_blocks(index, INDEX_BLOCK_BYTES)
    sums.write_bytes(np.array([*of_bin, *of_index], dtype="<u4").tobytes())
    return Shard(
        file=file, sums=sums.name, documents=documents, tokens=tokens, dtype=dtype, bin_sha256=bin_sha256,
        idx_bytes=index.stat().st_size, idx_sha256=idx_sha256, idx_blocks=len(of_index),
    )  # fmt: skip


def bin_path(folder: Path, shard: Shard) -> Path:
    return folder / f"{shard.file}.bin"


def idx_path(folder: Path, shard: Shard) -> Path:
    return folder / f"{shard.file}.idx"


def sums_path(folder: Path, shard: Shard) -> Path:
    return folder / shard.sums

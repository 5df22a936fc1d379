"""Reader of Megatron's .bin/.idx token files, memory-mapped, without torch or Megatron.

    .bin  every token of every document, one after the other
    .idx  magic, version, dtype code, counts | lengths int32 | byte offsets int64 | document bounds int64

The format is megatron/core/datasets/indexed_dataset.py's (0.16); preprocess.py writes it with Megatron's own builder.
"""

import mmap
import struct
from bisect import bisect_left, bisect_right
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gpt4moe.data.blocks import INDEX_BLOCK_BYTES, Blocks
from gpt4moe.errors import DataError

_NAME = "Restore it from its original, or name another pair of files, by its path without .bin and .idx."

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
"""Code of a token's type in .idx -> numpy's name."""
_STRETCH = 1 << 20
"""Entries of an index that are looked at in one go."""
_LANDMARK = 256
_LANDMARKS_OF_A_LOOK = 256
"""So many of them are made in the time of two halvings (0.1 ms)."""
_LANDMARKS_AT_ONCE = 1 << 12
"""Made from 16 MB of an index."""


class DocumentIndex:
    """An .idx, mapped: where documents begin. A few documents are found by halving, and once that would have paid for
    it, by a table of every 256th.

    Args:
        prefix: path without .idx.
    Raises: DataError for a file that is missing, truncated or of another format.
    """

    def __init__(self, prefix: Path):
        self.prefix = prefix
        if not _with(prefix, ".idx").is_file():
            raise DataError(f"{_with(prefix, '.idx')} is missing.", _NAME)
        if _size(prefix, ".idx") < HEADER.size:
            raise _damaged(prefix, ".idx", f"has {_size(prefix, '.idx')} bytes, not even a header")
        with _with(prefix, ".idx").open("rb") as file:
            self._mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        index: NDArray[np.uint8] = np.frombuffer(self._mapped, dtype=np.uint8)
        magic, version, code, num_sequences, num_bounds = HEADER.unpack(bytes(index[: HEADER.size]))
        if magic != MAGIC or version != 1 or code not in DTYPES:
            raise _damaged(prefix, ".idx", "is no Megatron index of whole numbers, version 1")
        lengths_end = HEADER.size + 4 * num_sequences
        offsets_end = lengths_end + 8 * num_sequences
        expected = offsets_end + 8 * num_bounds
        if len(index) < expected or num_bounds < 1:
            raise _damaged(prefix, ".idx", f"has {len(index)} bytes where {expected} belong")
        self.dtype = np.dtype(DTYPES[code])
        self._content, self._offsets_at, self._bounds_at = index, lengths_end, offsets_end
        self._lengths: NDArray[np.int32] = index[HEADER.size : lengths_end].view("<i4")
        self._offsets: NDArray[np.int64] = index[lengths_end:offsets_end].view("<i8")
        self._bounds: NDArray[np.int64] = index[offsets_end:expected].view("<i8")
        self.num_bytes = int(self._offsets[-1]) + int(self._lengths[-1]) * self.dtype.itemsize if num_sequences else 0
        """Of the .bin."""
        self._looks = 0
        """Stretches that were found by halving."""
        self._blocks: Blocks | None = None

    def check_as_read(self, sums: NDArray[np.uint32], made_by: str) -> None:
        """From now on a block is checked before a number of it is used; those of header and end, which were, at once.

        Args:
            sums: of the blocks of the file.
            made_by: the command that makes such a source, for errors.
        Raises: DataError for a damaged block.
        """
        self._blocks = Blocks(_with(self.prefix, ".idx"), self._content, sums, INDEX_BLOCK_BYTES, made_by)
        for size, end in ((HEADER.size, HEADER.size), (4, self._offsets_at), (8, self._bounds_at)):
            self._blocks.require(end - size, end)

    def _require_whole(self, array_at: int, first: int, last: int) -> None:
        """Of numbers first to last - 1 of an array of int64 that begins at a byte."""
        if self._blocks is not None and first < last:
            self._blocks.require(array_at + 8 * first, array_at + 8 * last)

    @property
    def num_tokens(self) -> int:
        return self.num_bytes // self.dtype.itemsize

    @property
    def num_documents(self) -> int:
        return len(self._bounds) - 1

    def start(self, document: int) -> int:
        """Its first token. Of num_documents: the number of tokens."""
        self._require_whole(self._bounds_at, document, document + 1)
        sequence = int(self._bounds[document])
        if sequence >= len(self._offsets):
            return self.num_tokens
        self._require_whole(self._offsets_at, sequence, sequence + 1)
        return int(self._offsets[sequence]) // self.dtype.itemsize

    def require_sound(self) -> None:
        """Reads all of it. Raises: DataError when sequences do not follow one another, or documents do not have all of
        them: an index with a flipped bit, whose ends are those of the file all the same."""
        count, before = len(self._lengths), 0
        for first in range(0, count, _STRETCH):
            lengths = self._lengths[first : first + _STRETCH].astype(np.int64) * self.dtype.itemsize
            offsets = np.cumsum(lengths) - lengths + before
            if lengths.min() < 0 or not np.array_equal(offsets, self._offsets[first : first + _STRETCH]):
                raise _damaged(self.prefix, ".idx", f"has sequences from {first} on that do not follow one another")
            before += int(lengths.sum())
        if self._bounds[0] != 0 or self._bounds[-1] != count:
            ends = f"{self._bounds[0]} to {self._bounds[-1]}"
            raise _damaged(self.prefix, ".idx", f"has documents of the sequences {ends}, and there are {count}")
        for first in range(0, self.num_documents, _STRETCH):
            if np.diff(self._bounds[first : first + _STRETCH + 1]).min() < 0:
                raise _damaged(self.prefix, ".idx", f"has documents from {first} on that do not follow one another")
        self._leave_pages()

    def document_at(self, token: int) -> tuple[int, int]:
        """The document that has a token, and the token's place in it."""
        document = bisect_right(range(self.num_documents), token, key=self.start) - 1
        return document, token - self.start(document)

    def starts(self, first: int, last: int) -> NDArray[np.int64]:
        """First tokens of the documents that begin at one of the tokens first to last - 1, ascending."""
        if self._looks * _LANDMARKS_OF_A_LOOK < self.num_documents // _LANDMARK:
            self._looks += 1
            begin, end = (bisect_left(range(self.num_documents), token, key=self.start) for token in (first, last))
            found = self._starts_of(slice(begin, end))
            self._leave_pages()
            return found
        begin, end = np.searchsorted(self._landmarks, (first, last)).tolist()
        found = self._starts_of(slice(max(0, begin - 1) * _LANDMARK, min(end * _LANDMARK, self.num_documents)))
        return found[found.searchsorted(first) : found.searchsorted(last)]

    @cached_property
    def _landmarks(self) -> NDArray[np.int64]:
        """Where every _LANDMARK-th document starts: what is looked for lies between two of them."""
        found, step = [], _LANDMARK * _LANDMARKS_AT_ONCE
        for first in range(0, self.num_documents, step):
            found.append(self._starts_of(slice(first, min(first + step, self.num_documents), _LANDMARK)))
            self._leave_pages()
        return np.concatenate(found) if found else np.zeros(0, dtype=np.int64)

    def _leave_pages(self) -> None:
        """What was read leaves this process. It lies on all pages of the file, or on one in each half, which the kernel
        maps by up to 2 MB: thousands of shards would keep gigabytes of those."""
        self._mapped.madvise(mmap.MADV_DONTNEED)

    def _starts_of(self, documents: slice) -> NDArray[np.int64]:
        """Their first tokens; without documents at the end that have no tokens."""
        self._require_whole(self._bounds_at, documents.start, documents.stop)
        sequences = self._bounds[documents]
        sequences = sequences[sequences < len(self._offsets)]
        if len(sequences):
            self._require_whole(self._offsets_at, int(sequences[0]), int(sequences[-1]) + 1)
        return self._offsets[sequences] // self.dtype.itemsize


class IndexedTokens:
    """One pair of files, mapped for reading. The files must not change while it is in use.

    Args:
        prefix: path without .bin and .idx.
    Raises: DataError for a file that is missing, truncated or of another format.
    """

    def __init__(self, prefix: Path):
        self.prefix = prefix
        self.index = DocumentIndex(prefix)
        if not _with(prefix, ".bin").is_file():
            raise DataError(f"{_with(prefix, '.bin')} is missing.", _NAME)
        size = self.index.num_bytes
        if _size(prefix, ".bin") != size or size == 0:
            raise _damaged(prefix, ".bin", f"has {_size(prefix, '.bin')} bytes, its index says {size}")
        self.tokens: NDArray[np.integer] = np.memmap(_with(prefix, ".bin"), mode="r", dtype=self.index.dtype)
        """[num_tokens], all documents in file order."""

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_documents(self) -> int:
        return self.index.num_documents

    def document(self, index: int) -> NDArray[np.integer]:
        """Tokens of one document, with its EOS."""
        return self.tokens[self.index.start(index) : self.index.start(index + 1)]

    def document_starts(self) -> NDArray[np.int64]:
        """[num_documents]: the first token of each."""
        return self.index.starts(0, self.num_tokens)


def _damaged(prefix: Path, suffix: str, what: str) -> DataError:
    return DataError(
        f"{_with(prefix, suffix)} is damaged: it {what}.", "Restore the file from its original, or make it again."
    )


def _with(prefix: Path, suffix: str) -> Path:
    return prefix.with_name(prefix.name + suffix)


def _size(prefix: Path, suffix: str) -> int:
    return _with(prefix, suffix).stat().st_size

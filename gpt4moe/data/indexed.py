"""Reader of Megatron's .bin/.idx token files, memory-mapped, without torch or Megatron.

    .bin  every token of every document, one after the other
    .idx  magic, version, dtype code, counts | lengths int32 | byte offsets int64 | document bounds int64

The format is megatron/core/datasets/indexed_dataset.py's (0.16); preprocess.py writes it with Megatron's own builder.
"""

import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gpt4moe.errors import DataError

MAKE_DATA = "Run `make data` (it makes data/demo) or tools/tokenize_corpus.py for your own text, or choose data=mock."

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
"""Code of a token's type in .idx -> numpy's name."""


class IndexedTokens:
    """One pair of files, mapped for reading. The files must not change while it is in use.

    Args:
        prefix: path without .bin and .idx.
    Raises: DataError for a file that is missing, truncated or of another format.
    """

    def __init__(self, prefix: Path):
        self.prefix = prefix
        for path in (_with(prefix, ".idx"), _with(prefix, ".bin")):
            if not path.is_file():
                raise DataError(f"{path} is missing.", MAKE_DATA)
        if _size(prefix, ".idx") < HEADER.size:
            raise self._damaged(".idx", f"has {_size(prefix, '.idx')} bytes, not even a header")
        index: NDArray[np.uint8] = np.memmap(_with(prefix, ".idx"), mode="r", dtype=np.uint8)
        magic, version, code, num_sequences, num_bounds = HEADER.unpack(bytes(index[: HEADER.size]))
        if magic != MAGIC or version != 1 or code not in DTYPES:
            raise self._damaged(".idx", "is no Megatron index of whole numbers, version 1")
        lengths_end = HEADER.size + 4 * num_sequences
        offsets_end = lengths_end + 8 * num_sequences
        expected = offsets_end + 8 * num_bounds
        if len(index) < expected or num_bounds < 1:
            raise self._damaged(".idx", f"has {len(index)} bytes where {expected} belong")
        dtype = np.dtype(DTYPES[code])
        self._lengths: NDArray[np.int32] = index[HEADER.size : lengths_end].view("<i4")
        self._offsets: NDArray[np.int64] = index[lengths_end:offsets_end].view("<i8")
        self._bounds: NDArray[np.int64] = index[offsets_end:expected].view("<i8")
        size = int(self._offsets[-1]) + int(self._lengths[-1]) * dtype.itemsize if num_sequences else 0
        if _size(prefix, ".bin") != size or size == 0:
            raise self._damaged(".bin", f"has {_size(prefix, '.bin')} bytes, its index says {size}")
        self.tokens: NDArray[np.integer] = np.memmap(_with(prefix, ".bin"), mode="r", dtype=dtype)
        """[num_tokens], all documents in file order."""

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_documents(self) -> int:
        return len(self._bounds) - 1

    def document(self, index: int) -> NDArray[np.integer]:
        """Tokens of one document, with its EOS."""
        first, last = int(self._bounds[index]), int(self._bounds[index + 1]) - 1
        start = int(self._offsets[first]) // self.tokens.itemsize
        return self.tokens[start : int(self._offsets[last]) // self.tokens.itemsize + int(self._lengths[last])]

    def document_starts(self) -> NDArray[np.int64]:
        """[num_documents]: the first token of each."""
        return self._offsets[self._bounds[:-1]] // self.tokens.itemsize

    def document_at(self, token: int) -> tuple[int, int]:
        """The document that has a token, and the token's place in it."""
        starts = self.document_starts()
        document = int(np.searchsorted(starts, token, side="right")) - 1
        return document, token - int(starts[document])

    def _damaged(self, suffix: str, what: str) -> DataError:
        return DataError(f"{_with(self.prefix, suffix)} is damaged: it {what}.", f"Delete its folder. {MAKE_DATA}")


def _with(prefix: Path, suffix: str) -> Path:
    return prefix.with_name(prefix.name + suffix)


def _size(prefix: Path, suffix: str) -> int:
    return _with(prefix, suffix).stat().st_size

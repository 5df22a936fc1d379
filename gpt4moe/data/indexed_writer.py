"""Writer of Megatron's .bin/.idx token files, without torch or Megatron. Both indexed.py and Megatron read them."""

from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gpt4moe.data.indexed import DTYPES, HEADER, MAGIC
from gpt4moe.data.manifest import Shard
from gpt4moe.data.shards import describe

_STRETCH = 1 << 20
"""Documents whose offsets are in memory at once."""

SHARD_BYTES = 4_000_000_000
"""Of a .bin; a shard ends with the document that passes it."""


def token_dtype(vocab_size: int) -> "np.dtype[np.integer]":
    """That a token of such a vocabulary is stored in, as Megatron chooses it."""
    return np.dtype("<u2" if vocab_size < 65500 else "<i4")


class PairWriter:
    """One pair of files that is being written, a document at a time.

    Args:
        prefix: path without .bin and .idx.
    """

    def __init__(self, prefix: Path, dtype: "np.dtype[np.integer]"):
        self.prefix, self.dtype = prefix, dtype
        self.lengths: list[int] = []
        self.num_tokens = 0
        self._stream = prefix.with_name(f"{prefix.name}.bin").open("wb")

    @property
    def num_bytes(self) -> int:
        return self.num_tokens * self.dtype.itemsize

    def add(self, document: ArrayLike) -> None:
        tokens: NDArray[np.integer] = np.asarray(document, dtype=self.dtype)
        self._stream.write(tokens.tobytes())
        self.lengths.append(len(tokens))
        self.num_tokens += len(tokens)

    def finish(self) -> Shard:
        """Writes .idx and .sums. Returns: the manifest's entry."""
        self._stream.close()
        write_index(self.prefix.with_name(f"{self.prefix.name}.idx"), np.array(self.lengths, dtype="<i8"), self.dtype)
        return describe(
            self.prefix, self.prefix.with_name(f"{self.prefix.name}.sums"), file=self.prefix.name,
            documents=len(self.lengths), tokens=self.num_tokens, dtype=self.dtype.name,
        )  # fmt: skip


class ShardWriter:
    """Pairs of files PREFIX-00000, PREFIX-00001, ... that are being written; each ends with `close`.

    Args:
        prefix: path of the shards' names before their number.
    """

    def __init__(self, prefix: Path, dtype: "np.dtype[np.integer]"):
        self.prefix, self.dtype = prefix, dtype
        self.shards: list[Shard] = []
        self.pair: PairWriter | None = None
        """The open one."""

    @property
    def num_tokens(self) -> int:
        """Of the open shard."""
        return self.pair.num_tokens if self.pair is not None else 0

    @property
    def num_bytes(self) -> int:
        return self.num_tokens * self.dtype.itemsize

    def add(self, document: ArrayLike) -> None:
        if self.pair is None:
            number = len(self.shards)
            self.pair = PairWriter(self.prefix.with_name(f"{self.prefix.name}-{number:05}"), self.dtype)
        self.pair.add(document)

    def close(self) -> None:
        if self.pair is not None:
            self.shards.append(self.pair.finish())
        self.pair = None


def write_index(path: Path, lengths: NDArray[np.int64], dtype: "np.dtype[np.integer]") -> None:
    """The .idx of documents that follow one another.

    Args:
        lengths: tokens of each document.
        dtype: of a token.
    """
    code, count, before = next(code for code, name in DTYPES.items() if np.dtype(name) == dtype), len(lengths), 0
    with path.open("wb") as stream:
        stream.write(HEADER.pack(MAGIC, 1, code, count, count + 1))
        stream.write(lengths.astype("<i4").tobytes())
        for start in range(0, count, _STRETCH):
            part = lengths[start : start + _STRETCH]
            stream.write(((np.cumsum(part) - part + before) * dtype.itemsize).astype("<i8").tobytes())
            before += int(part.sum())
        for start in range(0, count + 1, _STRETCH):
            stream.write(np.arange(start, min(count + 1, start + _STRETCH), dtype="<i8").tobytes())

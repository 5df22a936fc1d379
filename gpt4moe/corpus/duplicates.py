"""Exact duplicates of a source, on disk: of equal documents the first in input order stays.

    keys of each piece, its own duplicates out --by first bits--> buckets --sort each--> a byte per document: stays?

Memory: one bucket, about 2 million documents, and one piece's keys. A key is in a bucket once for each piece that has
it, so a text that fills a source fills no bucket. Two documents are equal when their normalised texts are: NFC, every
run of white space one space, none at the ends.
"""

import hashlib
import shutil
import unicodedata
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gpt4moe.durable import sync_file

KEY_BYTES = 16
_BUCKET_DOCUMENTS = 1 << 21
_ENTRY = np.dtype([("high", ">u8"), ("low", ">u8"), ("number", "<u8")])


def duplicate_key(text: str, data: bytes) -> bytes:
    """Equal for texts that are equal but for white space and the form of their accents."""
    if not text.isascii():
        data = unicodedata.normalize("NFC", text).encode()
    return hashlib.sha256(b" ".join(data.split())).digest()[:KEY_BYTES]


def mark_first(
    keys: Iterable[bytes], num_documents: int, result: Path, *, older: Iterable[bytes] = (), num_older: int = 0,
    bucket_documents: int = _BUCKET_DOCUMENTS,
) -> None:  # fmt: skip
    """Writes a byte for every document: 1 where it stays, 0 where an earlier one has its key.

    Args:
        keys: of each piece in input order, KEY_BYTES for each of its documents.
        older: keys of num_older documents that come before these, and have no byte.
        result: written beside and renamed, so that it is whole once it is there.
        bucket_documents: that are sorted at once.
    """
    folder = result.with_name(f"{result.name}.buckets")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    num_documents += num_older
    temporary = result.with_name(f"{result.name}.part")
    stays: NDArray[np.uint8] = np.memmap(temporary, mode="w+", dtype=np.uint8, shape=max(1, num_documents))
    stays[:] = 1
    bits = max(0, (max(1, num_documents) - 1).bit_length() - (bucket_documents.bit_length() - 1))
    number = 0
    for data in chain(older, keys):
        entries = np.empty(len(data) // KEY_BYTES, dtype=_ENTRY)
        pairs = np.frombuffer(data, dtype=">u8").reshape(-1, 2)
        entries["high"], entries["low"] = pairs[:, 0], pairs[:, 1]
        entries["number"] = np.arange(number, number + len(entries))
        number += len(entries)
        _append(folder, _firsts(entries, stays), bits)
    for path in sorted(folder.iterdir()):
        _firsts(np.fromfile(path, dtype=_ENTRY), stays)
    stays.flush()  # type: ignore[attr-defined]
    if num_older:
        stays[num_older:].tofile(folder / "new")
        temporary = folder / "new"
    sync_file(temporary)
    temporary.replace(result)
    result.with_name(f"{result.name}.part").unlink(missing_ok=True)
    shutil.rmtree(folder)


def _firsts(entries: NDArray[np.void], stays: NDArray[np.uint8]) -> NDArray[np.void]:
    """The first entry of each key. The others get a 0 in `stays`."""
    entries = entries[np.lexsort((entries["number"], entries["low"], entries["high"]))]
    is_same: NDArray[np.bool_] = np.zeros(len(entries), dtype=np.bool_)
    is_same[1:] = (entries["high"][1:] == entries["high"][:-1]) & (entries["low"][1:] == entries["low"][:-1])
    stays[entries["number"][is_same]] = 0
    return entries[~is_same]


def _append(folder: Path, entries: NDArray[np.void], bits: int) -> None:
    if not len(entries):
        return
    buckets = (entries["high"] >> np.uint64(64 - bits)).astype(np.int64) if bits else np.zeros(len(entries), np.int64)
    order = np.argsort(buckets, kind="stable")
    found, starts = np.unique(buckets[order], return_index=True)
    for bucket, part in zip(found, np.split(entries[order], starts[1:]), strict=True):
        with (folder / f"{bucket:06x}").open("ab") as stream:
            stream.write(part.tobytes())

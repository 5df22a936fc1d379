"""fill_all: stretches of checkpoint files into torch tensors, in one pass over the bytes, by a few threads.

    stretches --cut at blocks--> all of a block goes to one place   read there, its hash compared there
                                 parts of a block                   read and compared in the cache, then copied

Threads read and hash the next blocks while this one copies: both leave the interpreter to others. A damaged block is
found when it is in its place already: a target that was not filled to its end holds anything.
"""

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from math import prod

import numpy as np
import torch
from torch import Tensor

from gpt4moe.checkpoint.storage import ITEM_BYTES, VerifiedFile

READ_THREADS = min(4, len(os.sched_getaffinity(0)))
"""Of a rank. Its neighbours on the node read too."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """Elements that follow one another in a file."""

    file: VerifiedFile
    start: int
    """First byte in the file's data."""
    out: Tensor
    """Where they go, in C order; any dtype and device, to which values are cast."""


def fill_all(stretches: Iterable[Stretch]) -> None:
    """Copies every stretch to its place. Raises: CheckpointError for the first block that is damaged or unreadable."""
    with ThreadPoolExecutor(READ_THREADS, "read-checkpoint") as pool:
        waiting: deque[tuple[list[Stretch], int, Future[np.ndarray | None] | np.ndarray]] = deque()
        parts = (part for stretch in stretches for part in _cut(stretch, stretch.out))
        for (file, index), group in groupby(parts, key=_place):
            some = list(group)
            block = file.cached(index)
            waiting.append((some, index, pool.submit(_read, file, index, some) if block is None else block))
            if len(waiting) > READ_THREADS:
                _copy(*waiting.popleft())
        while waiting:
            _copy(*waiting.popleft())


def _place(part: Stretch) -> tuple[VerifiedFile, int]:
    return part.file, part.start // part.file.entry.block_bytes


def _cut(stretch: Stretch, out: Tensor) -> Iterator[Stretch]:
    """A stretch as parts that each lie in one block, in order."""
    file, start, size = stretch.file, stretch.start, ITEM_BYTES * out.numel()
    room = file.entry.block_bytes - start % file.entry.block_bytes
    if size <= room:
        yield Stretch(file, start, out)
        return
    if out.is_contiguous():
        out = out.view(-1)
    axis = next(axis for axis, length in enumerate(out.shape) if length > 1)
    inner = ITEM_BYTES * prod(out.shape[axis + 1 :])
    fitting = room // inner
    # Rows up to the block's end; else the row that reaches over it.
    length = fitting or 1
    first, rest = out.narrow(axis, 0, length), out.narrow(axis, length, out.shape[axis] - length)
    yield from _cut(Stretch(file, start, first), first)
    if rest.numel():
        yield from _cut(Stretch(file, start + length * inner, rest), rest)


def _read(file: VerifiedFile, index: int, parts: list[Stretch]) -> np.ndarray | None:
    """The block, checked; None: it is in its place."""
    out = parts[0].out
    is_whole = ITEM_BYTES * out.numel() == file.block_size(index)
    if is_whole and out.device.type == "cpu" and out.dtype is torch.float32 and out.is_contiguous():
        file.read_block(index, out.view(-1).numpy().view(np.uint8))
        return None
    return file.block(index)


def _copy(parts: list[Stretch], index: int, found: "Future[np.ndarray | None] | np.ndarray") -> None:
    block = found.result() if isinstance(found, Future) else found
    if block is None:
        return
    for part in parts:
        low = part.start - index * part.file.entry.block_bytes
        values = block[low : low + ITEM_BYTES * part.out.numel()].view(np.float32)
        part.out.copy_(torch.from_numpy(values).view(part.out.shape))

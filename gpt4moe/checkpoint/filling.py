"""fill_stretches: parts of checkpoint files into torch tensors, in one pass over the bytes, by a few threads.

    stretches --cut at blocks--> fp32 on the host              each part is read to its place, and hashed there
                                 another dtype, device, order  the block is read to a buffer, hashed there, and copied

Threads read and hash the next blocks while this one copies: both leave the interpreter to others. A damaged block is
found when it is in its place already: a target that was not filled to its end holds anything.
"""

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from math import prod

import numpy as np
import torch
from torch import Tensor

from gpt4moe.checkpoint.storage import ITEM_BYTES, VerifiedFile

READ_THREADS = min(4, len(os.sched_getaffinity(0)))
"""Of a rank. Its neighbours on the node read too."""
MOST_PLACES = 64
"""That one block is read to. Where it has more, copying is faster than that many reads."""

Part = tuple[int, Tensor]
"""(its first byte in a block, where it goes)"""


@dataclass(frozen=True, slots=True)
class Stretch:
    """Elements that follow one another in a file."""

    file: VerifiedFile
    start: int
    """First byte in the file's data."""
    out: Tensor
    """Where they go, in C order; any dtype and device, to which values are cast."""


def fill_stretches(stretches: Iterable[Stretch]) -> None:
    """Copies every stretch to its place. A block is read again for each stretch that comes back to it after another
    block: give them in the order of the files. Raises: CheckpointError for the first block that is damaged or
    unreadable."""
    with ThreadPoolExecutor(READ_THREADS, "read-checkpoint") as pool, _copying_alone():
        waiting: deque[tuple[list[Part], np.ndarray | None, Future[None]]] = deque()
        spare: list[np.ndarray] = []
        cut = (part for stretch in stretches for part in _cut(stretch, stretch.out))
        for (file, index), group in groupby(cut, key=_place):
            parts = [(part.start - index * file.entry.block_bytes, part.out) for part in group]
            places, buffer = _own_memory(parts), None
            if places is None:
                size = file.block_size(index)
                buffer = _large_enough(spare.pop() if spare else None, size)
                places = [(0, buffer[:size])]
            waiting.append((parts, buffer, pool.submit(file.read_block, index, places)))
            if len(waiting) > READ_THREADS:
                spare += _finish(*waiting.popleft())
        while waiting:
            _finish(*waiting.popleft())


@contextmanager
def _copying_alone() -> Iterator[None]:
    """torch copies in this thread alone: its other threads would look out for the next copy, without a pause, on the
    processors that read. On two of them a load in bf16 took four times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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


def _own_memory(parts: list[Part]) -> list[tuple[int, np.ndarray]] | None:
    """Places for VerifiedFile.read_block: the parts' own memory. None: values are cast, on another device or not one
    after the other in memory, or there are many small parts, or two of the same bytes."""
    places, end = [], 0
    if len(parts) > MOST_PLACES:
        return None
    for low, out in parts:
        if low < end or out.device.type != "cpu" or out.dtype is not torch.float32 or not out.is_contiguous():
            return None
        places.append((low, out.view(-1).numpy().view(np.uint8)))
        end = low + len(places[-1][1])
    return places


def _large_enough(spare: np.ndarray | None, size: int) -> np.ndarray:
    """Blocks differ in size from file to file. A buffer that is used again has its pages already."""
    return spare if spare is not None and len(spare) >= size else np.empty(size, dtype=np.uint8)


def _finish(parts: list[Part], buffer: np.ndarray | None, read: Future[None]) -> list[np.ndarray]:
    """Returns: the buffer, if it was one, for another block."""
    read.result()
    if buffer is None:
        return []
    for low, out in parts:
        values = buffer[low : low + ITEM_BYTES * out.numel()].view(np.float32)
        out.copy_(torch.from_numpy(values).view(out.shape))
    return [buffer]

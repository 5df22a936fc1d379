"""CheckpointIndex: where each piece of each logical tensor of a checkpoint lies; reads any box of it. No torch."""

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from math import prod
from pathlib import Path

import numpy as np

from gpt4moe.checkpoint.block_cache import BlockCache
from gpt4moe.checkpoint.cover import Rectangle, cover_problem, tensor_problems
from gpt4moe.checkpoint.manifest import Manifest
from gpt4moe.checkpoint.storage import ITEM_BYTES, StoredPiece, VerifiedFile
from gpt4moe.errors import CheckpointError, DamagedCheckpoint

RUN_ELEMENTS = 4 * 2**20  # 16 MiB a read

Where = tuple[slice, ...]


class CheckpointIndex:
    """A committed checkpoint, open for reading. Reads manifest.json and every file's header once, and checks them.

    Host memory: block_cache.BlockCache and one read at a time, whatever the tensors' sizes.
    Raises: CheckpointError when there is no checkpoint, or a file is missing, of another size or has a damaged header.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.manifest = Manifest.load(folder)
        self.cache = BlockCache()
        self.files: dict[str, VerifiedFile] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.pieces: dict[str, list[StoredPiece]] = {}
        for entry in self.manifest.files:
            file = self.files[entry.name] = VerifiedFile(folder, entry, self.cache)
            for name, shape, piece in file.pieces():
                if self.shapes.setdefault(name, shape) != shape:
                    raise DamagedCheckpoint(folder, f"{file.path} says that {name} is {list(shape)}, another file not.")
                self.pieces.setdefault(name, []).append(piece)

    def problems(self) -> Iterator[str]:
        """Everything that is wrong: slices missing or doubled, blocks whose bytes changed. Reads every byte.

        Raises: CheckpointError when the table of optimizers does not have the checkpoint's.
        """
        boxes = {name: [(piece.offset, piece.shape) for piece in pieces] for name, pieces in self.pieces.items()}
        yield from tensor_problems(self.shapes, boxes, self.manifest.tensor_names, self.manifest.optimizer.states)
        listed = dict.fromkeys(self.files, 0)
        for piece in (piece for pieces in self.pieces.values() for piece in pieces):
            listed[piece.file] += prod(piece.shape) * ITEM_BYTES
        for name, file in self.files.items():
            if listed[name] != file.data_bytes:
                yield f"{file.path} has {file.data_bytes} bytes of data, its header lists {listed[name]}"
            yield from file.problems()

    def shape(self, name: str) -> tuple[int, ...]:
        """Global shape. Raises: CheckpointError when there is no such tensor."""
        if name not in self.shapes:
            raise CheckpointError(
                f"{self.folder} has no tensor {name}.", "The checkpoint is of another model or optimizer."
            )
        return self.shapes[name]

    def read_box(
        self, name: str, offset: tuple[int, ...], shape: tuple[int, ...]
    ) -> Iterator[tuple[Where, np.ndarray]]:
        """The stored values of the box [offset, offset + shape) of a tensor: (where in the box, values).

        Values are fp32, at most RUN_ELEMENTS, and not to be written to.
        """
        yield from read_pieces(self.pieces[name], offset, shape, self.read_run)

    def read_run(self, piece: StoredPiece, at: tuple[int, ...], size: tuple[int, ...]) -> np.ndarray:
        """The values of a box [at, at + size) that is contiguous in the piece (see runs)."""
        return self.files[piece.file].read_floats(byte_of(piece, at), prod(size)).reshape(size)


def byte_of(piece: StoredPiece, at: tuple[int, ...]) -> int:
    """Where the element `at` of a tensor, which is in the piece, lies in its file's data."""
    place = sum(
        (a - o) * prod(piece.shape[axis + 1 :]) for axis, (a, o) in enumerate(zip(at, piece.offset, strict=True))
    )
    return piece.start + ITEM_BYTES * place


ReadRun = Callable[[StoredPiece, tuple[int, ...], tuple[int, ...]], np.ndarray]
"""(piece, offset, shape) -> values of a box that is contiguous in the piece (runs)."""


def read_pieces(
    pieces: Sequence[StoredPiece], offset: tuple[int, ...], shape: tuple[int, ...], read_run: ReadRun
) -> Iterator[tuple[Where, np.ndarray]]:
    """The values that pieces of a tensor hold of a box: (where in the box, values)."""
    for piece, at, size, where in runs_of_box(pieces, offset, shape):
        yield where, read_run(piece, at, size)


def runs_of_box(
    pieces: Sequence[StoredPiece], offset: tuple[int, ...], shape: tuple[int, ...], most: int | None = None
) -> Iterator[tuple[StoredPiece, tuple[int, ...], tuple[int, ...], Where]]:
    """What pieces of a tensor hold of a box, as (piece, offset, shape, where in the box), each contiguous in its piece.

    Args:
        most: elements of each; None: RUN_ELEMENTS.
    """
    for piece in pieces:
        common = overlap((offset, shape), (piece.offset, piece.shape))
        for at, size in () if common is None else runs(piece, *common, most):
            yield piece, at, size, tuple(slice(a - o, a - o + n) for a, o, n in zip(at, offset, size, strict=True))


def pieces_of_box(pieces: Sequence[StoredPiece], offset: tuple[int, ...], shape: tuple[int, ...]) -> list[StoredPiece]:
    """The pieces of a tensor that overlap with a box of it, few of the thousands that a large tensor has."""
    return [piece for piece in pieces if overlap((offset, shape), (piece.offset, piece.shape)) is not None]


def cover_of_box(pieces: Sequence[StoredPiece], offset: tuple[int, ...], shape: tuple[int, ...]) -> str | None:
    """What is wrong with how pieces of a tensor cover a box of it (a part missing or stored twice), or None."""
    common = [overlap((offset, shape), (piece.offset, piece.shape)) for piece in pieces]
    inside = [
        (
            tuple(a - o for a, o in zip(begin, offset, strict=True)),
            tuple(b - a for a, b in zip(begin, end, strict=True)),
        )
        for begin, end in (found for found in common if found is not None)
    ]
    return cover_problem(shape, inside)


def overlap(a: Rectangle, b: Rectangle) -> tuple[list[int], list[int]] | None:
    """The intersection of two boxes of a tensor as (begin, end), or None."""
    begin = [max(x, y) for x, y in zip(a[0], b[0], strict=True)]
    end = [min(x + n, y + m) for x, n, y, m in zip(*a, *b, strict=True)]
    return (begin, end) if all(x < y for x, y in zip(begin, end, strict=True)) else None


def runs(
    piece: StoredPiece, begin: list[int], end: list[int], most: int | None = None
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Cuts the box [begin, end) into boxes (offset, shape), contiguous in the piece and of at most `most` elements;
    None: RUN_ELEMENTS."""
    most = most or RUN_ELEMENTS
    axis = len(begin) - 1  # the outermost axis whose inner axes are all taken whole and fit one read together
    while axis > 0 and end[axis] - begin[axis] == piece.shape[axis] and prod(piece.shape[axis:]) <= most:
        axis -= 1
    inner = tuple(b - a for a, b in zip(begin[axis + 1 :], end[axis + 1 :], strict=True))
    rows = most // prod(inner)
    for outer in product(*(range(a, b) for a, b in zip(begin[:axis], end[:axis], strict=True))):
        for row in range(begin[axis], end[axis], rows):
            size = min(rows, end[axis] - row)
            yield (*outer, row, *begin[axis + 1 :]), (*(1,) * axis, size, *inner)

"""CheckpointReader: fills any flat range of any shard from a checkpoint, whatever layout wrote it."""

from collections.abc import Iterator
from itertools import product
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from gpt4moe.checkpoint.cover import cover_problem
from gpt4moe.checkpoint.manifest import Manifest
from gpt4moe.checkpoint.storage import StoredPiece, VerifiedFile, data_start, stored_pieces
from gpt4moe.errors import CheckpointError
from gpt4moe.parallel.shard import Shard, flat_rectangles

_RUN_ELEMENTS = 4 * 2**20  # 16 MiB a read


class CheckpointReader:
    """A committed checkpoint, open for reading: its manifest and where each piece of each tensor lies.

    Host memory: a block of each file and one read at a time, whatever the tensors' sizes.
    Raises: CheckpointError when it is incomplete or damaged.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.manifest = Manifest.load(folder)
        self.files: dict[str, VerifiedFile] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.pieces: dict[str, list[StoredPiece]] = {}
        for entry in self.manifest.files:
            file = self.files[entry.name] = VerifiedFile(folder, entry)
            for name, shape, piece in stored_pieces(file.header(), entry.name, data_start(file)):
                self.shapes[name] = shape
                self.pieces.setdefault(name, []).append(piece)

    def verify(self) -> None:
        """Checks every block's hash and every tensor's cover."""
        for name, shape in self.shapes.items():
            wrong = cover_problem(shape, [(piece.offset, piece.shape) for piece in self.pieces[name]])
            if wrong:
                raise CheckpointError(f"{self.folder}: {name}: {wrong}.", "Take another checkpoint of the run.")
        for file in self.files.values():
            file.verify()

    def tensor(self, name: str) -> Tensor:
        """A whole logical tensor, fp32."""
        shape = self._shape(name)
        out = torch.empty(prod(shape), dtype=torch.float32)
        self.fill(name, Shard(name, shape, (0,) * len(shape), shape), 0, out.numel(), out)
        return out.view(shape)

    def fill(self, name: str, shard: Shard, start: int, end: int, out: Tensor) -> None:
        """Copies elements [start, end) of `shard` (C order) of tensor `name` into `out`.

        Args:
            name: with its kind, e.g. `exp_avg/decoder...`; `shard` says which part of it.
            out: flat, end - start elements, any device; cast to its dtype.
        Raises: CheckpointError when the tensor is absent, of another shape, or not all there.
        """
        if self._shape(name) != shard.global_shape:
            raise CheckpointError(
                f"{self.folder}: {name} is {list(self.shapes[name])}, the model needs {list(shard.global_shape)}.",
                "The checkpoint is of another model: check model.* against its manifest.json.",
            )
        filled = 0
        for part in flat_rectangles(start, end, shard.shape):
            target = out[part.start - start :][: prod(part.shape)].view(part.shape)
            low = tuple(a + b for a, b in zip(shard.offset, part.offset, strict=True))
            for piece in self.pieces[name]:
                filled += self._copy_overlap(piece, low, target)
        if filled != end - start:
            raise CheckpointError(
                f"{self.folder}: {end - start - filled} elements of {name} are missing.", "Take another checkpoint."
            )

    def _shape(self, name: str) -> tuple[int, ...]:
        if name not in self.shapes:
            raise CheckpointError(
                f"{self.folder} has no tensor {name}.", "The checkpoint is of another model or optimizer."
            )
        return self.shapes[name]

    def _copy_overlap(self, piece: StoredPiece, low: tuple[int, ...], target: Tensor) -> int:
        """Copies what `piece` holds of the rectangle at `low` shaped like `target`; returns the number of elements."""
        begin = [max(a, b) for a, b in zip(low, piece.offset, strict=True)]
        end = [min(a + n, b + m) for a, n, b, m in zip(low, target.shape, piece.offset, piece.shape, strict=True)]
        if any(a >= b for a, b in zip(begin, end, strict=True)):
            return 0
        for at, size in _runs(piece, begin, end):
            place = sum(
                (a - o) * prod(piece.shape[axis + 1 :])
                for axis, (a, o) in enumerate(zip(at, piece.offset, strict=True))
            )
            values = self.files[piece.file].read_floats(piece.start + 4 * place, prod(size))
            where = tuple(slice(a - o, a - o + n) for a, o, n in zip(at, low, size, strict=True))
            target[where] = torch.from_numpy(values.copy()).view(size)
        return prod(b - a for a, b in zip(begin, end, strict=True))


def _runs(piece: StoredPiece, begin: list[int], end: list[int]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The box [begin, end) as (offset, shape) of boxes that are contiguous in the piece, at most _RUN_ELEMENTS each
    (or one row of the axis that varies)."""
    axis = len(begin) - 1  # the outermost axis whose inner axes are all taken whole
    while axis > 0 and end[axis] - begin[axis] == piece.shape[axis]:
        axis -= 1
    inner = tuple(b - a for a, b in zip(begin[axis + 1 :], end[axis + 1 :], strict=True))
    rows = max(1, _RUN_ELEMENTS // prod(inner))
    for outer in product(*(range(a, b) for a, b in zip(begin[:axis], end[:axis], strict=True))):
        for row in range(begin[axis], end[axis], rows):
            size = min(rows, end[axis] - row)
            yield (*outer, row, *begin[axis + 1 :]), (*(1,) * axis, size, *inner)

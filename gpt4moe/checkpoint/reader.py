"""CheckpointReader: fills any flat range of any shard from a checkpoint, whatever layout wrote it."""

from collections.abc import Iterable, Iterator
from math import prod

import torch
from torch import Tensor

from gpt4moe.checkpoint.filling import Stretch, fill_stretches
from gpt4moe.checkpoint.index import CheckpointIndex, byte_of, cover_of_box, overlap, pieces_of_box, runs_of_box
from gpt4moe.checkpoint.storage import StoredPiece
from gpt4moe.errors import CheckpointError, DamagedCheckpoint
from gpt4moe.parallel.shard import Shard, flat_rectangles

_Wanted = tuple[StoredPiece, int, tuple[int, ...], Tensor]
"""(a piece, the first byte of it that is wanted, offset of a box of the tensor, where the box's elements go)"""


class CheckpointReader(CheckpointIndex):
    """A CheckpointIndex that reads into torch tensors; model.weights.load_weights fills a whole model with it.

    Host memory beside the tensors: where blocks are not read to their places, a buffer for each of
    filling.READ_THREADS and one more (filling.fill_stretches).
    """

    def tensor(self, name: str) -> Tensor:
        """A whole logical tensor, KIND/NAME, fp32. Raises: CheckpointError, as fill."""
        shape = self.shape(name)
        out = torch.empty(prod(shape), dtype=torch.float32)
        self.fill(name, Shard(name, shape, (0,) * len(shape), shape), 0, out.numel(), out)
        return out.view(shape)

    def fill(self, name: str, shard: Shard, start: int, end: int, out: Tensor) -> None:
        """fill_all for one tensor; several by several calls take longer: each reads its blocks whole."""
        self.fill_all([(name, shard, start, end, out)])

    def fill_all(self, targets: Iterable[tuple[str, Shard, int, int, Tensor]]) -> None:
        """Copies elements [start, end) of `shard` (C order) of tensor `name` into `out`, for each target. Every block
        of the files is read once, whatever tensors have parts of it.

        Args:
            targets: (name, shard, start, end, out); the name with its kind, e.g. `exp_avg/decoder...`; `shard` says
                which part of it; `out` is flat, has end - start elements, any device and dtype: values are cast.
        Raises: CheckpointError when a tensor is absent, of another shape, damaged, or not all there.
        """
        boxes = [box for target in targets for box in self._boxes(*target)]
        boxes.sort(key=lambda box: (box[0].file, box[1]))
        fill_stretches(stretch for box in boxes for stretch in self._stretches(*box))

    def _boxes(self, name: str, shard: Shard, start: int, end: int, out: Tensor) -> Iterator[_Wanted]:
        """What pieces hold of the elements. Raises: as fill_all; DamagedCheckpoint when some are there twice."""
        if self.shape(name) != shard.global_shape:
            raise CheckpointError(
                f"{self.folder}: {name} is {list(self.shapes[name])}, the model needs {list(shard.global_shape)}.",
                "The checkpoint is of another model: check model.* against its manifest.json.",
            )
        for part in flat_rectangles(start, end, shard.shape):
            target = out[part.start - start :][: prod(part.shape)].view(part.shape)
            low = tuple(a + b for a, b in zip(shard.offset, part.offset, strict=True))
            pieces = pieces_of_box(self.pieces[name], low, part.shape)
            wrong = cover_of_box(pieces, low, part.shape)
            if wrong:
                raise DamagedCheckpoint(self.folder, f"{self.folder}: {name}: {wrong}.")
            for piece in pieces:
                common = overlap((low, part.shape), (piece.offset, piece.shape))
                assert common is not None, "pieces_of_box"
                yield piece, byte_of(piece, tuple(common[0])), low, target

    def _stretches(self, piece: StoredPiece, byte: int, low: tuple[int, ...], target: Tensor) -> Iterator[Stretch]:
        shape = tuple(target.shape)
        for _, at, _, where in runs_of_box([piece], low, shape, most=prod(shape)):
            yield Stretch(self.files[piece.file], byte_of(piece, at), target[where])

"""CheckpointReader: fills any flat range of any shard from a checkpoint, whatever layout wrote it."""

from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor

from gpt4moe.checkpoint.filling import Stretch, fill_all
from gpt4moe.checkpoint.index import CheckpointIndex, byte_of, cover_of_box, pieces_of_box, runs_of_box
from gpt4moe.errors import CheckpointError, DamagedCheckpoint
from gpt4moe.parallel.shard import Shard, flat_rectangles


class CheckpointReader(CheckpointIndex):
    """A CheckpointIndex that reads into torch tensors; model.weights.load_weights fills a whole model with it.

    Host memory beside the tensors: block_cache.BlockCache, and a block of each of filling.READ_THREADS and one more.
    """

    def tensor(self, name: str) -> Tensor:
        """A whole logical tensor, KIND/NAME, fp32. Raises: CheckpointError, as fill."""
        shape = self.shape(name)
        out = torch.empty(prod(shape), dtype=torch.float32)
        self.fill(name, Shard(name, shape, (0,) * len(shape), shape), 0, out.numel(), out)
        return out.view(shape)

    def fill(self, name: str, shard: Shard, start: int, end: int, out: Tensor) -> None:
        """Copies elements [start, end) of `shard` (C order) of tensor `name` into `out`.

        Args:
            name: with its kind, e.g. `exp_avg/decoder...`; `shard` says which part of it.
            out: flat, end - start elements, any device; values are cast to its dtype.
        Raises: CheckpointError when the tensor is absent, of another shape, damaged, or not all there.
        """
        if self.shape(name) != shard.global_shape:
            raise CheckpointError(
                f"{self.folder}: {name} is {list(self.shapes[name])}, the model needs {list(shard.global_shape)}.",
                "The checkpoint is of another model: check model.* against its manifest.json.",
            )
        fill_all(self._stretches(name, shard, start, end, out))

    def _stretches(self, name: str, shard: Shard, start: int, end: int, out: Tensor) -> Iterator[Stretch]:
        """Of the elements, piece by piece. Raises: DamagedCheckpoint when some are missing, or there twice."""
        for part in flat_rectangles(start, end, shard.shape):
            target = out[part.start - start :][: prod(part.shape)].view(part.shape)
            low = tuple(a + b for a, b in zip(shard.offset, part.offset, strict=True))
            pieces = pieces_of_box(self.pieces[name], low, part.shape)
            wrong = cover_of_box(pieces, low, part.shape)
            if wrong:
                raise DamagedCheckpoint(self.folder, f"{self.folder}: {name}: {wrong}.")
            for piece, at, _, where in runs_of_box(pieces, low, part.shape, most=prod(part.shape)):
                yield Stretch(self.files[piece.file], byte_of(piece, at), target[where])

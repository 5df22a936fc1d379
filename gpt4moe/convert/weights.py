"""Weights: the weights of a model in a folder of any format, read as fp32 boxes of logical tensors. No torch.

checkpoint of ours   CheckpointWeights   this file
Hugging Face folder  FolderWeights       pieces by huggingface.py
inference folder     FolderWeights       pieces by inference_layout.py
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Protocol

import numpy as np

from gpt4moe.architecture.rows import Shape
from gpt4moe.architecture.tensors import Box, logical_buffers, logical_shapes, routing_buffers
from gpt4moe.architecture.vision import is_vision
from gpt4moe.checkpoint.index import CheckpointIndex, cover_of_box, pieces_of_box, read_pieces, runs
from gpt4moe.checkpoint.manifest import Manifest
from gpt4moe.checkpoint.retention import find_checkpoint
from gpt4moe.checkpoint.storage import StoredPiece
from gpt4moe.config.load import config_from_dict
from gpt4moe.config.model import ModelConfig
from gpt4moe.config.run import RunConfig
from gpt4moe.config.stage import StageConfig, StageKind
from gpt4moe.convert.copy_pipeline import CHUNK_ELEMENTS
from gpt4moe.convert.safetensors_file import BYTES, Take, decoded
from gpt4moe.errors import ConversionError
from gpt4moe.parallel.shard import BUFFER, WEIGHT, flat_rectangles


class Weights:
    """Logical tensors of a model, by name. `pieces` say where each element is stored, at least once.

    Args:
        shapes: of the tensors, where they are not all of the model's.
    """

    def __init__(self, folder: Path, model: ModelConfig, dtype: str, shapes: dict[str, Shape] | None = None):
        self.folder, self.model, self.dtype = folder, model, dtype
        self.shapes = logical_shapes(model) | routing_buffers(model) if shapes is None else shapes
        self.pieces: dict[str, list[StoredPiece]] = {name: [] for name in self.shapes}

    def read_run(self, piece: StoredPiece, at: Shape, size: Shape) -> np.ndarray:
        """Values of a box that is contiguous in the piece, fp32."""
        raise NotImplementedError

    def values_added(self, name: str, offset: Shape, shape: Shape) -> np.ndarray | None:
        """What is added to the stored values of a box: of adapters. None: nothing."""
        return None

    def differing_copies(self) -> list[str]:
        """Copies that differ from their tensor: `NAME in FILE`."""
        return []

    def prefer_rank(self, tp_index: int, pp_index: int) -> None:
        """Of an inference folder: reads what several files have from that of this rank, which then needs no other.
        Folders of other formats have no such files."""

    def parts(self, name: str, box: Box) -> list[StoredPiece]:
        """The pieces that a box is read from. Raises: ConversionError when they do not cover it exactly once."""
        pieces = pieces_of_box(self.pieces[name], *box)
        wrong = cover_of_box(pieces, *box)
        if wrong:
            raise ConversionError(f"{self.folder}: {name}: {wrong}.", "Take another copy: this one is damaged.")
        return pieces

    def values(self, name: str, boxes: list[Box], take: Take | None = None) -> Iterator[np.ndarray]:
        """The elements of the boxes, one box after the other in C order: flat fp32 chunks of CHUNK_ELEMENTS.

        Args:
            take: returns a buffer of CHUNK_ELEMENTS for each chunk. Without it, a chunk is valid until the next one:
                new memory for each chunk would cost more than reading it.
        Raises: CheckpointError or ConversionError when a part is damaged or missing.
        """
        buffer = np.empty(CHUNK_ELEMENTS if take is None else 0, dtype=np.float32)
        for offset, shape in boxes:
            pieces = self.parts(name, (offset, shape))
            total = prod(shape)
            for start in range(0, total, CHUNK_ELEMENTS):
                end = min(total, start + CHUNK_ELEMENTS)
                chunk = (take() if take else buffer)[: end - start]
                for part in flat_rectangles(start, end, shape):
                    target = chunk[part.start - start :][: prod(part.shape)].reshape(part.shape)
                    low = tuple(a + b for a, b in zip(offset, part.offset, strict=True))
                    for where, values in read_pieces(pieces, low, part.shape, self.read_run):
                        target[where] = values
                    added = self.values_added(name, low, part.shape)
                    if added is not None:
                        target += added
                yield chunk


class CheckpointWeights(Weights):
    """The fp32 master weights of a checkpoint of ours; every block that is read is checked against its hash. Those of a
    vision model are its text model's.

    Args:
        path: a step folder, or a run folder (its latest).
    Raises: CheckpointError when there is none or it is damaged; ConversionError when it lacks tensors of its model, or
        has others.
    """

    def __init__(self, path: Path):
        self.index = CheckpointIndex(find_checkpoint(path))
        run = config_from_dict(self.index.manifest.config)
        self.run = text_run(run)
        super().__init__(self.index.folder, self.run.model, "F32")
        buffers = routing_buffers(self.model)
        key = {name: f"{BUFFER if name in buffers else WEIGHT}/{name}" for name in self.shapes}
        all_buffers = {f"{BUFFER}/{name}" for name in logical_buffers(self.model)}
        kinds = (f"{WEIGHT}/", f"{BUFFER}/")
        useless = all_buffers - set(key.values())  # only training uses these
        stored = {
            name.partition("/")[2] for name in self.index.shapes if name.startswith(kinds) and name not in useless
        }
        stored = {name for name in stored if not is_vision(name)}
        for name in sorted(stored ^ self.shapes.keys()):
            what = "has a tensor that its model does not have" if name in stored else "lacks a tensor of its model"
            raise ConversionError(
                f"{self.folder} {what}: {name}.", "Only checkpoints of text models, with all their weights, convert."
            )
        for name, shape in self.shapes.items():
            if self.index.shape(key[name]) != shape:
                raise ConversionError(
                    f"{self.folder}: {name} is {list(self.index.shape(key[name]))}, its model says {list(shape)}.",
                    "The checkpoint and its manifest do not belong together: take another one.",
                )
            self.pieces[name] = self.index.pieces[key[name]]

    @property
    def manifest(self) -> Manifest:
        """Of the run whose weights these are."""
        return self.index.manifest

    @property
    def block_hashes(self) -> list[list[str]]:
        """Of each file that values are made of."""
        return [entry.block_hashes for entry in self.index.manifest.files]

    def read_run(self, piece: StoredPiece, at: Shape, size: Shape) -> np.ndarray:
        return self.index.read_run(piece, at, size)


class BytesReader(Protocol):
    """A file that can be read by byte ranges: RawFile, storage.VerifiedFile."""

    def read(self, start: int, end: int) -> np.ndarray: ...


@dataclass(frozen=True, slots=True)
class TypedPiece(StoredPiece):
    """A piece in a file with several types."""

    dtype: str


def text_run(run: RunConfig) -> RunConfig:
    """The run without vision parts. What is written of it is read again, and a text model has no vision stage."""
    text = replace(run, model=replace(run.model, vision=None))
    return replace(text, stage=StageConfig()) if run.stage.kind is StageKind.vision else text


class FolderWeights(Weights):
    """Weights in files of another format. Whoever creates it fills `files` and `pieces` (TypedPiece)."""

    def __init__(self, folder: Path, model: ModelConfig, dtype: str, shapes: dict[str, Shape] | None = None):
        super().__init__(folder, model, dtype, shapes)
        self.files: dict[str, BytesReader] = {}
        self.copies: dict[str, list[StoredPiece]] = {}
        """Pieces that repeat elements of `pieces`."""
        self.file_of_rank: dict[tuple[int, int], str] = {}
        """Of an inference folder: (tp index, pp index) -> file."""

    def prefer_rank(self, tp_index: int, pp_index: int) -> None:
        file = self.file_of_rank.get((tp_index, pp_index))
        for name, copies in self.copies.items():
            pieces = self.pieces[name]
            for at, copy in enumerate(copies):
                if copy.file == file:
                    index = next(i for i, piece in enumerate(pieces) if piece.offset == copy.offset)
                    pieces[index], copies[at] = copy, pieces[index]

    def differing_copies(self) -> list[str]:
        return [
            f"{name} in {copy.file}"
            for name, copies in self.copies.items()
            for copy in copies
            if self.differs(name, copy)
        ]

    def differs(self, name: str, copy: StoredPiece) -> bool:
        """Whether a copy has other values than the piece that it repeats. Reads both."""
        return any(
            not np.array_equal(values.view(np.uint32), self.read_run(copy, at, values.shape).view(np.uint32))
            for at, values in self._original(name, copy)
        )

    def _original(self, name: str, copy: StoredPiece) -> Iterator[tuple[Shape, np.ndarray]]:
        """(offset in the tensor, values) of the piece that a copy repeats."""
        (original,) = (piece for piece in self.pieces[name] if piece.offset == copy.offset)
        end = [o + n for o, n in zip(original.offset, original.shape, strict=True)]
        for at, size in runs(original, list(original.offset), end):
            yield at, self.read_run(original, at, size)

    def read_run(self, piece: StoredPiece, at: Shape, size: Shape) -> np.ndarray:
        assert isinstance(piece, TypedPiece)
        place = sum(
            (a - o) * prod(piece.shape[axis + 1 :]) for axis, (a, o) in enumerate(zip(at, piece.offset, strict=True))
        )
        item = BYTES[piece.dtype]
        start = piece.start + place * item
        return decoded(self.files[piece.file].read(start, start + prod(size) * item), piece.dtype).reshape(size)

"""Which rank of a serving layout reads what of the files of to-inference: the loader's own reading, without data.

    inference files --open_folder--> Opened, its reader recorded --+
    modules of a stage, built on the meta device                 --+--read_chunks, each rank--> (file, box) -> bytes

The same functions load a real folder. Only the reading of elements is replaced, by a note of what was asked for.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np
import torch

from gpt4moe.architecture.tensors import Box
from gpt4moe.checkpoint.index import overlap
from gpt4moe.checkpoint.storage import VerifiedFile
from gpt4moe.config.parallel import ParallelConfig
from gpt4moe.convert.inference_grid import key_of
from gpt4moe.convert.inference_layout import open_inference_layout
from gpt4moe.convert.safetensors_file import BYTES
from gpt4moe.convert.weights import FolderWeights, TypedPiece
from gpt4moe.inference.load import BoxReader, open_folder, placed_run, read_chunks, require_placeable
from gpt4moe.model.gpt import build_model
from gpt4moe.parallel.layout import Layout
from gpt4moe.parallel.meta_device import pretended_rank
from gpt4moe.rehearsal.files import StageReads

Read = Counter[tuple[str, str]]
"""(file, key of a box in it) -> bytes read."""


class _Recorded:
    """The weights of a folder whose elements are not read: it notes the files and boxes they would come from."""

    def __init__(self, weights: FolderWeights):
        self.weights, self.read = weights, Read()
        self.folder, self.model, self.dtype, self.shapes = (
            weights.folder, weights.model, weights.dtype, weights.shapes,
        )  # fmt: skip

    def prefer_rank(self, tp_index: int, pp_index: int) -> None:
        self.weights.prefer_rank(tp_index, pp_index)

    def values(self, name: str, boxes: list[Box]) -> Iterator[np.ndarray]:
        """Nothing, after a note of the parts that Weights.values reads."""
        for box in boxes:
            for piece in self.weights.parts(name, box):
                common = overlap(box, (piece.offset, piece.shape))
                assert common is not None and isinstance(piece, TypedPiece)
                size = prod(end - begin for begin, end in zip(*common, strict=True))
                self.read[piece.file, key_of(name, (piece.offset, piece.shape))] += size * BYTES[piece.dtype]
        yield from ()


def read_stage(folder: Path, tp: int, layers_per_stage: list[int], stage: int) -> StageReads:
    """Loads every rank of one stage from an inference folder of this grid, without data.

    Raises: LayoutError where the loader does not take the grid; ConversionError where a rank needs what no file has.
    """
    weights = open_inference_layout(folder)
    opened = open_folder(folder, lambda _: weights)
    pp, moe = len(layers_per_stage), opened.run.model.moe
    parallel = ParallelConfig(tp=tp, pp=pp, ep=tp if moe else 1, layers_per_stage=layers_per_stage)
    run = placed_run(opened, parallel=parallel)
    require_placeable(run, tp * pp)
    layout, found = Layout.from_config(parallel, tp * pp), StageReads()
    with pretended_rank(layout, stage * tp) as groups:
        chunks = build_model(run, groups, meta=True)
        for tp_index in range(tp):
            # Ranks of a stage have the same modules; what a rank reads follows from its coordinate. The collectives of
            # the loader are fake, but they want numbers: on the CPU.
            of_rank = replace(groups, rank=stage * tp + tp_index, device=torch.device("cpu"))
            recorded = _Recorded(weights)
            read_chunks(replace(opened, reader=BoxReader(recorded)), chunks, of_rank)
            own = weights.file_of_rank[tp_index, stage]
            found.rank_bytes.append(sum(recorded.read.values()))
            held = _boxes_in(weights, own)
            found.shards += len(held)
            found.problems += _problems(f"rank {of_rank.rank} (tp {tp_index}, pp {stage})", own, held, recorded.read)
    return found


def _boxes_in(weights: FolderWeights, file: str) -> dict[str, int]:
    """Key -> bytes of every box in a file, by its header."""
    stored = weights.files[file]
    assert isinstance(stored, VerifiedFile)
    entries = {key: entry for key, entry in stored.header(BYTES).items() if key != "__metadata__"}
    return {key: entry["data_offsets"][1] - entry["data_offsets"][0] for key, entry in entries.items()}


def _problems(rank: str, own: str, held: dict[str, int], read: Read) -> Iterator[str]:
    """Where a rank does not read exactly its own file."""
    for (file, key), size in read.items():
        if file != own:
            yield f"{rank} reads {key} of {file}, which is another rank's"
        elif size != held[key]:
            yield f"{rank} reads {size} of the {held[key]} bytes of {key}"
    for key in held.keys() - {key for file, key in read if file == own}:
        yield f"{rank} does not read {key} of its file {own}: nobody needs it there"

"""The inference files of a rehearsed checkpoint: headers and index, no data; read back and checked. No torch."""

from dataclasses import dataclass, field
from functools import cache
from math import prod
from pathlib import Path

import xxhash

from gpt4moe.checkpoint.cover import cover_problem
from gpt4moe.checkpoint.index import CheckpointIndex
from gpt4moe.checkpoint.manifest import NAME
from gpt4moe.checkpoint.storage import FileEntry, block_bytes_for
from gpt4moe.config.model import ModelConfig
from gpt4moe.convert.export import DTYPES
from gpt4moe.convert.inference_grid import file_name, rank_contents
from gpt4moe.convert.inference_layout import (
    INDEX,
    index_row,
    index_text,
    open_inference_layout,
    rank_file,
)
from gpt4moe.convert.safetensors_file import tensors_header
from gpt4moe.convert.weights import CheckpointWeights, Weights
from gpt4moe.parallel.shard import WEIGHT

_DTYPE = "bf16"


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointFiles:
    """A checkpoint of the whole run, without its data."""

    folder: Path
    files: int
    size_bytes: int
    """What it would take."""
    manifest_bytes: int
    elements: dict[str, int]
    """Of the tensors of each kind: weights and the optimizer's states."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InferenceFiles:
    """A serving layout's files, without their data."""

    folder: Path
    tp: int
    pp: int
    layers_per_stage: list[int]
    files: int
    size_bytes: int
    """What they would take, bf16."""
    largest_bytes: int
    index_bytes: int
    problems: list[str]
    """Tensors that the files do not cover exactly; what a rank reads and does not need, or nobody reads."""
    reads: "InferenceReads | None" = None
    """None: the grid is none that our loader takes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InferenceReads:
    """What the ranks of a serving layout read of its files, each of its own."""

    ranks: int
    shards: int
    """Boxes of tensors in all files; a norm is one in each file of its stage."""
    least_bytes: int
    """Of one rank."""
    most_bytes: int
    total_bytes: int


@dataclass(kw_only=True, slots=True)
class StageReads:
    """What the ranks of one stage read."""

    rank_bytes: list[int] = field(default_factory=list)
    shards: int = 0
    problems: list[str] = field(default_factory=list)


def checkpoint_files(folder: Path) -> CheckpointFiles:
    index = CheckpointIndex(folder)
    elements = dict.fromkeys((WEIGHT, *index.manifest.optimizer.states), 0)
    for name, shape in index.shapes.items():
        kind = name.partition("/")[0]
        if kind in elements:  # the model's buffers are no parameters
            elements[kind] += prod(shape)
    return CheckpointFiles(
        folder=folder,
        files=len(index.files),
        size_bytes=sum(entry.size for entry in index.manifest.files),
        manifest_bytes=(folder / NAME).stat().st_size,
        elements=elements,
    )


def require_grid(model: ModelConfig, tp: int, pp: int) -> None:
    """Raises: ConversionError when a model cannot be cut so."""
    rank_contents(Weights(Path(), model, "F32"), tp, pp, None)


def write_inference(checkpoint: Path, out: Path, tp: int, pp: int) -> InferenceFiles:
    """Writes a hollow file a rank and the index, reads all back.

    Raises: ConversionError when the grid does not fit the model, or it has parts that no conversion knows.
    """
    source = CheckpointWeights(checkpoint)
    stages, ranks = rank_contents(source, tp, pp, None)
    code, word = DTYPES[_DTYPE]
    sizes = [len(layers) for layers in stages]
    out.mkdir(parents=True)
    rows = []
    for rank, held in ranks.items():
        tensors, metadata = rank_file(source, held)
        size = sum(tensor.size_bytes(code) for tensor in tensors)
        entry = write_hollow(out / file_name(*rank), tensors_header(tensors, code, metadata), size)
        rows.append(index_row(rank, stages, entry))
    facts = {"tp": tp, "pp": pp, "layers_per_stage": sizes, "dtype": word}
    (out / INDEX).write_text(index_text(source, facts, rows))
    return InferenceFiles(
        folder=out, tp=tp, pp=pp, layers_per_stage=sizes, files=len(rows),
        size_bytes=sum(row["size"] for row in rows), largest_bytes=max(row["size"] for row in rows),
        index_bytes=(out / INDEX).stat().st_size, problems=_problems(out),
    )  # fmt: skip


def _problems(folder: Path) -> list[str]:
    weights = open_inference_layout(folder)
    boxes = {name: [(piece.offset, piece.shape) for piece in pieces] for name, pieces in weights.pieces.items()}
    covers = ((name, cover_problem(shape, boxes[name])) for name, shape in weights.shapes.items())
    return [f"{folder}: {name}: {wrong}" for name, wrong in covers if wrong]


def write_hollow(path: Path, header: bytes, data_bytes: int) -> FileEntry:
    """A file of `data_bytes` zeros behind a true header, as a hole: it takes no disk, and readers open it as any other.

    Raises: OSError where the file system has no holes of that size.
    """
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + data_bytes)
    block_bytes = block_bytes_for(data_bytes)
    whole, rest = divmod(data_bytes, block_bytes)
    hashes = [_hash_of_zeros(block_bytes)] * whole + ([_hash_of_zeros(rest)] if rest else [])
    return FileEntry(
        name=path.name,
        size=len(header) + data_bytes,
        header_bytes=len(header),
        header_hash=xxhash.xxh3_64_hexdigest(header),
        block_bytes=block_bytes,
        block_hashes=hashes,
    )


@cache
def _hash_of_zeros(size: int) -> str:
    return xxhash.xxh3_64_hexdigest(bytes(size))

"""Inference folders: one safetensors file for each rank of a tp x pp grid, and index.json; written and read. No torch.

    tp-03-pp-00.safetensors   keys NAME@OFFSET as in a checkpoint: the box of the tensor that the rank has
    index.json                the grid, the layers of each stage, the model, every file's hashes; sealed by its sha256

inference_grid.py says which rank has what.
"""

import dataclasses
import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from gpt4moe.architecture.tensors import Box
from gpt4moe.checkpoint.block_cache import BlockCache
from gpt4moe.checkpoint.storage import FileEntry, VerifiedFile
from gpt4moe.config.load import config_from_dict, config_to_dict
from gpt4moe.config.typed import FieldError, from_plain, sealed, unsealed
from gpt4moe.convert.adapters import open_checkpoint
from gpt4moe.convert.copy_pipeline import progress_bar
from gpt4moe.convert.export import DTYPES
from gpt4moe.convert.inference_grid import file_name, key_of, rank_contents
from gpt4moe.convert.publish import published, refuse_existing
from gpt4moe.convert.safetensors_file import BYTES, NewTensor
from gpt4moe.convert.weights import CheckpointWeights, FolderWeights, TypedPiece, Weights
from gpt4moe.errors import ConversionError, Gpt4MoeError

Answer = dict[str, Any]


def to_inference_layout(
    checkpoint: Path, out: Path, *, tp: int, pp: int, layers_per_stage: list[int] | None = None, dtype: str = "bf16",
    base: Path | None = None, dry_run: bool = False,
) -> Answer:  # fmt: skip
    """Writes the rank files.

    Args:
        layers_per_stage: pp numbers; None: as evenly as possible, larger stages first.
        base: where the base of adapters is, if it was moved.
    Raises: ConversionError when the grid does not fit the model, or `out` exists or cannot be written; CheckpointError.
    """
    if not dry_run:
        refuse_existing(out)
    source = open_checkpoint(checkpoint, base)
    stages, ranks = rank_contents(source, tp, pp, layers_per_stage)
    code = DTYPES[dtype][0]
    sizes = {rank: sum(prod(box[1]) for _, box in held) * BYTES[code] for rank, held in ranks.items()}
    total = sum(sizes.values())
    answer: Answer = {
        "out": str(out), "tp": tp, "pp": pp, "layers_per_stage": [len(layers) for layers in stages],
        "dtype": DTYPES[dtype][1], "size_bytes": total,
        "files": [{"name": file_name(*rank), "size_bytes": size} for rank, size in sizes.items()],
    }  # fmt: skip
    if dry_run:
        return answer
    plan = json.dumps(["to-inference", answer, source.block_hashes])
    with published(out, plan, total) as draft, progress_bar(f"to {out.name}", total) as advance:
        files = []
        for rank, held in ranks.items():
            tensors, metadata = rank_file(source, held)
            entry = draft.tensors(file_name(*rank), tensors, dtype=code, metadata=metadata, advance=advance)
            files.append(index_row(rank, stages, entry))
        draft.text(INDEX, index_text(source, answer, files))
    return answer


def rank_file(source: Weights, held: list[tuple[str, Box]]) -> tuple[list[NewTensor], dict[str, str]]:
    """(tensors, metadata) of one rank's file."""
    shapes = json.dumps({name: source.shapes[name] for name, _ in held})
    return [_new(source, name, box) for name, box in held], {"shapes": shapes}


def index_row(rank: tuple[int, int], stages: list[list[int]], entry: FileEntry) -> dict[str, Any]:
    """A rank's file in index.json."""
    return {"tp": rank[0], "pp": rank[1], "layers": stages[rank[1]]} | dataclasses.asdict(entry)


def index_text(source: CheckpointWeights, answer: Answer, files: list[dict[str, Any]]) -> str:
    """The content of index.json."""
    manifest = source.manifest
    content = {
        "format": FORMAT, **{key: answer[key] for key in ("tp", "pp", "layers_per_stage", "dtype")},
        "step": manifest.step, "run_id": manifest.run_id, "config": config_to_dict(source.run),
        "files": files,
    }  # fmt: skip
    return sealed(json.dumps(content, indent=1))


def _new(source: Weights, name: str, box: Box) -> NewTensor:
    return NewTensor(key_of(name, box), box[1], lambda take: source.values(name, [box], take))


FORMAT = "gpt4moe inference 2"
INDEX = "index.json"


def open_inference_layout(folder: Path) -> FolderWeights:
    """The weights of an inference folder; every block that is read is checked against its hash.

    Raises: ConversionError when index.json is missing, damaged or of another format, or a file does not have what its
        rank should; CheckpointError when a file is damaged.
    """
    index = _index(folder)
    try:
        model = config_from_dict(index.config).model
        fields = [field.name for field in dataclasses.fields(FileEntry)]
        entries = [from_plain(FileEntry, {key: file[key] for key in fields}) for file in index.files]
        weights = FolderWeights(folder, model, {word: code for code, word in DTYPES.values()}[index.dtype])
        held = rank_contents(weights, index.tp, index.pp, index.layers_per_stage)[1]
    except (ValueError, KeyError, TypeError, AttributeError, Gpt4MoeError) as error:
        raise _no_index(folder, getattr(error, "cause", error)) from error
    expected = {file_name(*rank): boxes for rank, boxes in held.items()}
    if expected.keys() != {entry.name for entry in entries}:
        raise _no_index(folder, "its files are not those of its grid")
    weights.file_of_rank = {rank: file_name(*rank) for rank in held}
    cache = BlockCache()
    for entry in entries:
        file = weights.files[entry.name] = VerifiedFile(folder, entry, cache)
        _add(weights, entry.name, file.header(BYTES), expected[entry.name])
    return weights


@dataclass(frozen=True, slots=True)
class _Index:
    """index.json without its format."""

    tp: int
    pp: int
    layers_per_stage: list[int]
    dtype: str
    step: int
    run_id: str
    config: dict[str, Any]
    files: list[dict[str, Any]]


def _index(folder: Path) -> _Index:
    try:
        body = unsealed((folder / INDEX).read_bytes().decode(errors="replace"))
        index = json.loads(body or "{}")
    except (OSError, ValueError, RecursionError) as error:
        raise _no_index(folder, error) from error
    found = index.pop("format", None)
    if body is None or found != FORMAT:
        raise _no_index(folder, "its sha256 differs" if body is None else f"its format is {found!r}")
    try:
        return from_plain(_Index, index)
    except FieldError as error:
        raise _no_index(folder, error) from error


def _no_index(folder: Path, why: object) -> ConversionError:
    return ConversionError(
        f"{folder / INDEX} is no index of inference files ({why}).", "Make the folder again with to-inference."
    )


def _add(weights: FolderWeights, file: str, header: dict[str, Any], held: list[tuple[str, Box]]) -> None:
    """Adds the pieces of one rank's file; what another rank has too (norms, routers) is a copy."""
    if header.keys() - {"__metadata__"} != {key_of(name, box) for name, box in held}:
        raise ConversionError(f"{weights.folder}: {file} does not hold what its rank should.", "Make the folder again.")
    for name, box in held:
        stored = header[key_of(name, box)]
        piece = TypedPiece(file, *box, stored["data_offsets"][0], stored["dtype"])
        if tuple(stored["shape"]) != box[1]:
            raise ConversionError(
                f"{weights.folder}: {name} in {file} is {stored['shape']}, its rank should have {list(box[1])}.",
                "Make the folder again.",
            )
        is_copy = any(piece.offset == known.offset for known in weights.pieces[name])
        (weights.copies.setdefault(name, []) if is_copy else weights.pieces[name]).append(piece)

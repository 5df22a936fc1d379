"""An inference folder (inference_layout.py) as Weights. No torch."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from gpt4moe.architecture.tensors import Box
from gpt4moe.checkpoint.manifest import unsealed
from gpt4moe.checkpoint.storage import BlockCache, FileEntry, VerifiedFile
from gpt4moe.config.load import config_from_dict
from gpt4moe.convert.huggingface import DTYPES
from gpt4moe.convert.inference_grid import file_name, key_of, rank_contents
from gpt4moe.convert.weights import FolderWeights, TypedPiece
from gpt4moe.errors import ConversionError

FORMAT = "gpt4moe inference 2"
INDEX = "index.json"


def open_inference_layout(folder: Path) -> FolderWeights:
    """Such a folder as Weights; every block read is checked against its hash.

    Raises: ConversionError when index.json is missing, damaged or of another kind, or a file does not hold what its
        rank should; CheckpointError when a file is damaged.
    """
    index = _index(folder)
    try:
        model = config_from_dict(index["config"]).model
        fields = [field.name for field in dataclasses.fields(FileEntry)]
        entries = [FileEntry(**{key: file[key] for key in fields}) for file in index["files"]]
        weights = FolderWeights(folder, model, {word: code for code, word in DTYPES.values()}[index["dtype"]])
        held = rank_contents(weights, index["tp"], index["pp"], index["layers_per_stage"])[1]
    except (ValueError, KeyError, TypeError, ConversionError) as error:
        raise _no_index(folder, getattr(error, "cause", error)) from error
    expected = {file_name(*rank): boxes for rank, boxes in held.items()}
    if expected.keys() != {entry.name for entry in entries}:
        raise _no_index(folder, "its files are not those of its grid")
    cache = BlockCache()
    for entry in entries:
        file = weights.files[entry.name] = VerifiedFile(folder, entry, cache)
        _add(weights, entry.name, file.header(), expected[entry.name])
    return weights


def _index(folder: Path) -> dict[str, Any]:
    try:
        body = unsealed((folder / INDEX).read_bytes().decode(errors="replace"))
        index = json.loads(body or "{}")
    except (OSError, ValueError) as error:
        raise _no_index(folder, error) from error
    if body is None or index.get("format") != FORMAT:
        raise _no_index(folder, "its sha256 differs" if body is None else f"its format is {index.get('format')!r}")
    assert isinstance(index, dict)
    return index


def _no_index(folder: Path, why: object) -> ConversionError:
    return ConversionError(
        f"{folder / INDEX} is no index of inference files ({why}).", "Make the folder again with to-inference."
    )


def _add(weights: FolderWeights, file: str, header: dict[str, Any], held: list[tuple[str, Box]]) -> None:
    """The pieces of one rank's file; what another rank holds too (norms, routers) is a copy."""
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

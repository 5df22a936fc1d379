"""An inference folder (inference_layout.py) as Weights. No torch."""

import dataclasses
import json
from pathlib import Path

from gpt4moe.checkpoint.storage import BlockCache, FileEntry, VerifiedFile
from gpt4moe.config.load import config_from_dict
from gpt4moe.convert.huggingface import DTYPES
from gpt4moe.convert.weights import FolderWeights, TypedPiece
from gpt4moe.errors import ConversionError

FORMAT = "gpt4moe inference 1"
INDEX = "index.json"


def open_inference_layout(folder: Path) -> FolderWeights:
    """Such a folder as Weights; every block read is checked against its hash.

    Raises: ConversionError when index.json is missing or of another kind; CheckpointError when a file is damaged.
    """
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        if index["format"] != FORMAT:
            raise ValueError(f"its format is {index['format']!r}")
        model = config_from_dict(index["config"]).model
        fields = [field.name for field in dataclasses.fields(FileEntry)]
        entries = [FileEntry(**{key: file[key] for key in fields}) for file in index["files"]]
        weights = FolderWeights(folder, model, {word: code for code, word in DTYPES.values()}[index["dtype"]])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConversionError(
            f"{folder / INDEX} is no index of inference files ({error}).", "Make the folder again with to-inference."
        ) from error
    cache = BlockCache()
    for entry in entries:
        file = weights.files[entry.name] = VerifiedFile(folder, entry, cache)
        for key, stored in file.header().items():
            name, _, offset = key.rpartition("@")
            if not name:  # the metadata
                continue
            if name not in weights.pieces:
                raise ConversionError(f"{folder}: {key} is not of its model.", "Make the folder again.")
            place, start = tuple(map(int, offset.split(","))), stored["data_offsets"][0]
            if all(place != piece.offset for piece in weights.pieces[name]):  # norms lie on every rank
                piece = TypedPiece(entry.name, place, tuple(stored["shape"]), start, stored["dtype"])
                weights.pieces[name].append(piece)
    return weights

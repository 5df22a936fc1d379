"""The safetensors files of a folder of another program, and where our boxes lie in their tensors. No torch."""

import json
from collections.abc import Iterable
from math import prod
from pathlib import Path

from gpt4moe.convert.rules import Link, is_copy
from gpt4moe.convert.safetensors_file import BYTES, INDEX, NewTensor, RawFile, StoredTensor
from gpt4moe.convert.weights import FolderWeights, TypedPiece, Weights
from gpt4moe.errors import ConversionError


def stored_tensors(folder: Path) -> tuple[dict[str, StoredTensor], dict[str, str], dict[str, RawFile]]:
    """(tensors of all safetensors files, the file of each, the files); headers are checked."""
    index = folder / INDEX
    if index.exists():
        try:
            names = sorted({Path(name).name for name in json.loads(index.read_text())["weight_map"].values()})
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ConversionError(f"{index} is damaged.", "Copy or download it again.") from error
    else:
        names = sorted({path.name for path in folder.glob("*.safetensors")} - set(mistral_files(folder)))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing or not names:
        raise ConversionError(
            f"{folder} lacks {missing[0] if missing else 'safetensors files with the names of Hugging Face'}.",
            "Copy or download the folder again, in safetensors (other formats can run code).",
        )
    files = {name: RawFile(folder / name) for name in names}
    tensors: dict[str, StoredTensor] = {}
    places: dict[str, str] = {}
    for name, file in files.items():
        for key, tensor in file.tensors.items():
            if key in tensors:
                raise ConversionError(f"{folder} has {key} in two files.", "Copy or download the folder again.")
            tensors[key], places[key] = tensor, name
    return tensors, places, files


def mistral_files(folder: Path) -> list[str]:
    """Files in Mistral's own format. Its repositories have them beside the same weights in Hugging Face format."""
    return sorted(path.name for path in folder.glob("consolidated*.safetensors"))


def place(
    weights: FolderWeights, all_links: Iterable[Link], tensors: dict[str, StoredTensor], places: dict[str, str]
) -> dict[str, StoredTensor]:
    """Fills weights.pieces: finds each of our boxes in the tensors. Returns: the tensors that no link names.

    Args:
        tensors, places: of stored_tensors.
    Raises: ConversionError for a tensor that is missing or of another shape.
    """
    left = dict(tensors)
    for link in all_links:
        tensor = left.pop(link.theirs, None)
        if tensor is None:
            raise ConversionError(
                f"{weights.folder} has no tensor {link.theirs}.",
                "The folder is incomplete, or config.json is of another model.",
            )
        if tensor.shape != link.shape:
            raise ConversionError(
                f"{weights.folder}: {link.theirs} is {list(tensor.shape)}, config.json says {list(link.shape)}.",
                "The files and config.json do not belong together.",
            )
        start = tensor.start
        for offset, shape in link.boxes:
            piece = TypedPiece(places[link.theirs], offset, shape, start, tensor.dtype)
            weights.pieces[link.ours].append(piece)
            start += 0 if is_copy(link) else prod(shape) * BYTES[tensor.dtype]
    return left


def new_tensor(link: Link, source: Weights, prefix: str = "") -> NewTensor:
    """A tensor of theirs, made of our boxes; `prefix` stands before its name."""
    return NewTensor(prefix + link.theirs, link.shape, lambda take: source.values(link.ours, link.boxes, take))

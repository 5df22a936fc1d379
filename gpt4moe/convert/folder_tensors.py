"""The safetensors files of a folder of another program, and where our boxes lie in their tensors. No torch."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path

from gpt4moe.config.own_files import leads_out, plain_name
from gpt4moe.config.typed import from_plain
from gpt4moe.convert.rules import Link, is_copy
from gpt4moe.convert.safetensors_file import BYTES, INDEX, NewTensor, RawFile, StoredTensor
from gpt4moe.convert.weights import FolderWeights, TypedPiece, Weights
from gpt4moe.errors import ConversionError


def stored_tensors(folder: Path) -> tuple[dict[str, StoredTensor], dict[str, str], dict[str, RawFile]]:
    """(tensors of all safetensors files, the file of each, the files); headers are checked.

    A safetensors file may be a link to anywhere: it is read as numbers alone. An index may list a tensor that no file
    has, as after a tied lm_head was left out: `place` finds out whether it is needed.
    """
    index, weight_map = folder / INDEX, dict[str, str]()
    if index.exists():
        try:
            weight_map = from_plain(_WeightMap, {"weight_map": json.loads(read_own(index))["weight_map"]}).weight_map
            names = sorted({plain_name(name) for name in weight_map.values()})
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise ConversionError(f"{index} is damaged ({error}).", "Copy or download it again.") from error
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
    other = next((key for key, name in weight_map.items() if places.get(key, name) != name), None)
    if other is not None:
        raise ConversionError(
            f"{index} says that {other} is in {weight_map[other]}: it is in {places[other]}.",
            "Copy or download the folder again.",
        )
    return tensors, places, files


@dataclass(frozen=True, slots=True)
class _WeightMap:
    weight_map: dict[str, str]


def own_path(path: Path) -> Path:
    """The path, of a file that is its folder's own. Raises: ConversionError for a link that leads out of it."""
    elsewhere = leads_out(path)
    if elsewhere is not None:
        raise ConversionError(
            f"{path} is a link to {elsewhere}, out of its folder: it may be any file of this machine.",
            "If it is meant, copy the file itself into the folder: cp -L.",
        )
    return path


def read_own(path: Path) -> str:
    """The text of a file that is its folder's own. Raises: as own_path; ConversionError when it cannot be read."""
    try:
        return own_path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConversionError(f"{path} cannot be read ({error}).", "Copy or download the folder again.") from error


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

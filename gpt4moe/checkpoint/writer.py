"""The two halves of a save: every rank writes what it owns into one file; the first rank checks the whole, commits it.

    rank r   rank-R.safetensors, synced  ->  rank-R.written.json, renamed into place: "mine is on the disk", with hashes
    rank 0   once all of these are there: cover checked from the headers, then manifest.json = the commit

The files alone carry the news, so a background thread needs no collective: it could meet those of the training loop.
"""

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path

from gpt4moe.checkpoint.cover import Rectangle, tensor_problems
from gpt4moe.checkpoint.manifest import Manifest
from gpt4moe.checkpoint.storage import BlockCache, FileEntry, Piece, VerifiedFile, stored_pieces, write_file
from gpt4moe.errors import CheckpointError


def write_own(folder: Path, pieces: list[Piece], rank: int) -> None:
    """Writes one rank's file and the note that says so. Raises: OSError (a full disk, say)."""
    note_written(folder, rank, write_file(folder / file_name(rank), pieces))


def file_name(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def note_written(folder: Path, rank: int, entry: FileEntry) -> None:
    """Tells the rank that commits that this one's file is whole."""
    partial = folder / f"rank-{rank:05d}.tmp"
    partial.write_text(json.dumps(dataclasses.asdict(entry)))
    os.replace(partial, _note_of(folder, rank))


def all_written(folder: Path, world_size: int) -> bool:
    return len(list(folder.glob("rank-*.written.json"))) == world_size


def commit(folder: Path, manifest: Manifest, world_size: int) -> None:
    """Checks that all files together hold every tensor exactly once, then writes the manifest with their hashes.

    Raises: CheckpointError when they do not; OSError.
    """
    entries = [FileEntry(**json.loads(_note_of(folder, rank).read_text())) for rank in range(world_size)]
    wrong = next(_problems(folder, entries, manifest), None)
    if wrong:
        raise CheckpointError(f"{folder}: {wrong}.", "This is a mistake in the program: please report it.")
    for rank in range(world_size):
        _note_of(folder, rank).unlink()
    dataclasses.replace(manifest, files=entries).save(folder)


def _problems(folder: Path, entries: list[FileEntry], manifest: Manifest) -> Iterator[str]:
    shapes: dict[str, tuple[int, ...]] = {}
    boxes: dict[str, list[Rectangle]] = {}
    for entry in entries:
        header = VerifiedFile(folder, entry, BlockCache()).header()
        for name, shape, piece in stored_pieces(header, entry.name):
            if shapes.setdefault(name, shape) != shape:
                yield f"{name} is of shape {shape} in one file and {shapes[name]} in another"
            boxes.setdefault(name, []).append((piece.offset, piece.shape))
    yield from tensor_problems(shapes, boxes, manifest.tensor_names, manifest.optimizer.states)


def _note_of(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.written.json"

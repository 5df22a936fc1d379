"""save_checkpoint: every rank writes what it owns into one file; rank 0 checks the whole and commits it."""

import dataclasses
import json
import shutil
from pathlib import Path

import torch
from torch import distributed

from gpt4moe.checkpoint.cover import Rectangle, cover_problem
from gpt4moe.checkpoint.manifest import NAME, Manifest
from gpt4moe.checkpoint.storage import FileEntry, Piece, VerifiedFile, data_start, stored_pieces, write_file
from gpt4moe.errors import CheckpointError
from gpt4moe.parallel.groups import ProcessGroups


def save_checkpoint(folder: Path, pieces: list[Piece], manifest: Manifest, groups: ProcessGroups) -> None:
    """Writes a checkpoint folder. Collective over all ranks.

    Args:
        folder: made here; a leftover without a manifest is replaced, a committed one is left as it is.
        pieces: what this rank owns; all ranks' together cover every tensor exactly once.
        manifest: equal on every rank, its `files` empty.
    Raises: CheckpointError on every rank when a rank could not write (a full disk) or the cover is not exact; the
        folder is removed then, and earlier checkpoints are untouched.
    """
    if _agreed(1 if groups.is_first_rank and (folder / NAME).exists() else 0, groups):
        return
    if groups.is_first_rank:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    distributed.barrier(group=None)
    problem = _write_own(folder, pieces, groups.rank)
    if not _agreed(1 if problem else 0, groups) and groups.is_first_rank:
        problem = _commit(folder, manifest, groups.layout.world_size)
    if _agreed(1 if problem else 0, groups):
        if groups.is_first_rank:
            shutil.rmtree(folder, ignore_errors=True)
        raise CheckpointError(
            f"{folder} could not be saved: {problem or 'another rank failed'}.",
            "Earlier checkpoints are whole; make room or mend the cause, then start the run again.",
        )


def _agreed(flag: int, groups: ProcessGroups) -> bool:
    """Whether any rank raised its flag."""
    value = torch.tensor([flag], dtype=torch.int32, device=groups.device)
    distributed.all_reduce(value, op=distributed.ReduceOp.MAX)
    return bool(value.item())


def _write_own(folder: Path, pieces: list[Piece], rank: int) -> str | None:
    """Writes this rank's file and, beside it, its hashes for rank 0. Returns what went wrong."""
    try:
        entry = write_file(folder / f"rank-{rank:05d}.safetensors", pieces)
        _hashes_of(folder, rank).write_text(json.dumps(dataclasses.asdict(entry)))
    except OSError as error:
        return str(error)
    return None


def _hashes_of(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.hashes.json"


def _commit(folder: Path, manifest: Manifest, world_size: int) -> str | None:
    """Merges the ranks' hashes, checks the cover from the files' headers, writes the manifest. Returns what is wrong."""
    try:
        entries = [FileEntry(**json.loads(_hashes_of(folder, rank).read_text())) for rank in range(world_size)]
        tensors: dict[str, tuple[tuple[int, ...], list[Rectangle]]] = {}
        for entry in entries:
            file = VerifiedFile(folder, entry)
            for name, shape, piece in stored_pieces(file.header(), entry.name, data_start(file)):
                tensors.setdefault(name, (shape, []))[1].append((piece.offset, piece.shape))
        for name, (shape, rectangles) in tensors.items():
            wrong = cover_problem(shape, rectangles)
            if wrong:
                return f"{name}: {wrong}"
        for rank in range(world_size):
            _hashes_of(folder, rank).unlink()
        dataclasses.replace(manifest, files=entries).save(folder)
    except OSError as error:
        return str(error)
    return None

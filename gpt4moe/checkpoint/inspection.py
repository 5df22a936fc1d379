"""Inspecting checkpoints without a model and without torch: which exist, what they hold, what is damaged, what differs.

Each answer is plain data for JSON; inspection_text makes lines for people of it. `listing` and `description` read
manifests (and headers, when tensors are asked for), never weights.
"""

import dataclasses
from datetime import UTC, datetime
from math import isfinite, prod
from pathlib import Path
from typing import Any

import numpy as np

from gpt4moe.checkpoint.health import reasons
from gpt4moe.checkpoint.index import CheckpointIndex, runs
from gpt4moe.checkpoint.manifest import NAME, Manifest
from gpt4moe.checkpoint.retention import find_checkpoint, step_folders
from gpt4moe.config.checksums import SUMS, changed_files
from gpt4moe.errors import CheckpointError

Answer = dict[str, Any]


def listing(path: Path) -> Answer:
    """The checkpoints of a run folder, or of its checkpoints folder, ascending; uncommitted and damaged ones too. Of a
    committed one `suspect` says why it is (health); empty: it is healthy.

    Raises: CheckpointError when there is no step folder.
    """
    folders = sorted(step_folders(path / "checkpoints")) or sorted(step_folders(path))
    if not folders:
        raise CheckpointError(f"{path} holds no checkpoints.", "Give a run folder like runs/NAME.")
    return {"checkpoints": [_listed(step, folder) for step, folder in folders]}


def _listed(step: int, folder: Path) -> Answer:
    answer: Answer = {"step": step, "folder": str(folder), "state": "uncommitted"}
    if not (folder / NAME).exists():
        return answer
    try:
        manifest = Manifest.load(folder)
    except CheckpointError:
        return answer | {"state": "damaged"}
    saved = datetime.fromtimestamp((folder / NAME).stat().st_mtime, UTC)
    return answer | {
        "state": "committed",
        "saved": saved.isoformat(timespec="seconds"),
        "files": len(manifest.files),
        "size_bytes": sum(entry.size for entry in manifest.files),
        "consumed_samples": manifest.consumed_samples,
        "layout": manifest.layout,
        "run_id": manifest.run_id,
        "suspect": reasons(folder),
    }


def description(path: Path, *, tensors: bool) -> Answer:
    """A checkpoint's manifest, of its files only name and size, and why it is suspect; with `tensors`, each one's shape
    and number of slices.

    Raises: CheckpointError when there is no checkpoint, or its manifest or a header is damaged.
    """
    folder = find_checkpoint(path)
    index = CheckpointIndex(folder) if tensors else None
    manifest = index.manifest if index else Manifest.load(folder)
    answer = {"folder": str(folder), **dataclasses.asdict(dataclasses.replace(manifest, files=[]))}
    answer["suspect"] = reasons(folder)
    answer["files"] = [{"name": entry.name, "size_bytes": entry.size} for entry in manifest.files]
    if index:
        answer["tensors"] = {
            name: {"shape": list(index.shapes[name]), "dtype": "F32", "slices": len(index.pieces[name])}
            for name in sorted(index.shapes)
        }
    return answer


def verification(path: Path) -> Answer:
    """Whether every byte is as it was written and every element is there once. Reads everything.

    Raises: CheckpointError when there is no checkpoint at all. Damage is not raised: it is the answer.
    """
    folder = find_checkpoint(path)
    answer: Answer = {"folder": str(folder), "tensors": 0, "slices": 0, "size_bytes": 0}
    try:
        index = CheckpointIndex(folder)
        return {
            "folder": str(folder),
            "tensors": len(index.shapes),
            "slices": sum(map(len, index.pieces.values())),
            "size_bytes": sum(entry.size for entry in index.manifest.files),
            "problems": [*index.problems(), *_beside(folder)],
        }
    except CheckpointError as error:
        return answer | {"problems": [error.cause]}


def _beside(folder: Path) -> list[str]:
    """What was changed in folders that from-hf put beside the weights: its tokenizer's."""
    return [found for sums in sorted(folder.glob(f"*/{SUMS}")) for found in changed_files(sums.parent)]


def difference(a: Path, b: Path, *, tolerance: float) -> Answer:
    """Which logical tensors of two checkpoints differ, and by how much, whatever layouts wrote them.

    Args:
        tolerance: largest absolute difference of elements that passes as equal; 0 compares bits.
    Raises: CheckpointError when one is absent or damaged.
    """
    ours, theirs = CheckpointIndex(find_checkpoint(a)), CheckpointIndex(find_checkpoint(b))
    common = sorted(ours.shapes.keys() & theirs.shapes.keys())
    same_shape = [name for name in common if ours.shapes[name] == theirs.shapes[name]]
    compared = [_compared(name, ours, theirs) for name in same_shape]
    beyond = [
        row
        for row in compared
        if row["elements"] and (not tolerance or row["max_abs"] is None or row["max_abs"] > tolerance)
    ]
    return {
        "a": str(ours.folder),
        "b": str(theirs.folder),
        "compared": len(compared),
        "different": beyond,
        "other_shape": [
            {"tensor": name, "a": list(ours.shapes[name]), "b": list(theirs.shapes[name])}
            for name in common
            if name not in same_shape
        ],
        "only_in_a": sorted(ours.shapes.keys() - theirs.shapes.keys()),
        "only_in_b": sorted(theirs.shapes.keys() - ours.shapes.keys()),
    }


def _compared(name: str, ours: CheckpointIndex, theirs: CheckpointIndex) -> Answer:
    """Elements whose bits differ, the largest difference, and |a - b| / |a|; None where a number is not finite."""
    elements, seen, largest, distance, norm = 0, 0, 0.0, 0.0, 0.0
    for piece in ours.pieces[name]:
        end = [o + n for o, n in zip(piece.offset, piece.shape, strict=True)]
        for at, size in runs(piece, list(piece.offset), end):
            left = ours.read_run(piece, at, size)
            norm += float(np.square(left, dtype=np.float64).sum())
            for where, right in theirs.read_box(name, at, size):
                seen += right.size
                differs = left[where].view(np.uint32) != right.view(np.uint32)
                if differs.any():
                    gap = np.abs(left[where][differs].astype(np.float64) - right[differs])
                    gap[np.isnan(gap)] = np.inf
                    elements += gap.size
                    largest, distance = max(largest, float(gap.max())), distance + float(np.square(gap).sum())
    if seen != prod(ours.shapes[name]):
        raise CheckpointError(f"{theirs.folder} has not all of {name}.", "Run `verify` on both checkpoints.")
    relative = distance**0.5 / norm**0.5 if norm else float(distance > 0)
    finite = {key: value if isfinite(value) else None for key, value in (("max_abs", largest), ("relative", relative))}
    return {"tensor": name, "elements": elements, "of": seen, **finite}

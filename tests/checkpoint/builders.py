"""Small checkpoints without a model: random rectangle cuts of arrays, written as ranks would."""

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from gpt4moe.checkpoint.cover import Rectangle
from gpt4moe.checkpoint.manifest import Manifest
from gpt4moe.checkpoint.storage import FileEntry, Piece
from gpt4moe.checkpoint.writing import write_file

SHAPES = {"a.weight": (7, 5), "b.experts.gate_up": (3, 2, 4, 5), "c.norm": (11,)}
KINDS = ("weight", "exp_avg", "exp_avg_sq")


def manifest(**changes: object) -> Manifest:
    """A manifest as a run writes it, without files."""
    fields: dict[str, object] = {
        "step": 3, "consumed_samples": 24, "consumed_per_source": {"books": 20, "code": 4}, "optimizer_step": 3,
        "run_id": "0123456789abcdef", "identity": {"seed": 1, "model": {"hidden_size": 5}},
        "config": {"run": {"seed": 1}}, "layout": "one rank", "versions": {"torch": "2.0"}, "files": [],
    }  # fmt: skip
    return Manifest(**(fields | changes))  # type: ignore[arg-type]


def random_cut(shape: tuple[int, ...], cuts: int, rng: random.Random) -> list[Rectangle]:
    """`cuts` + 1 or fewer rectangles that cover `shape` exactly once, in any order: guillotine cuts."""
    boxes: list[Rectangle] = [((0,) * len(shape), shape)]
    for _ in range(cuts):
        offset, size = boxes.pop(rng.randrange(len(boxes)))
        axis = rng.randrange(len(shape))
        if size[axis] == 1:
            boxes.append((offset, size))
            continue
        at = rng.randint(1, size[axis] - 1)
        boxes.append((offset, (*size[:axis], at, *size[axis + 1 :])))
        moved = (*offset[:axis], offset[axis] + at, *offset[axis + 1 :])
        boxes.append((moved, (*size[:axis], size[axis] - at, *size[axis + 1 :])))
    rng.shuffle(boxes)
    return boxes


def piece(name: str, array: np.ndarray, offset: tuple[int, ...], shape: tuple[int, ...]) -> Piece:
    box = array[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))]
    return Piece(name, array.shape, offset, shape, torch.from_numpy(box.copy()).reshape(-1))


def state(seed: int = 0, shapes: dict[str, tuple[int, ...]] = SHAPES) -> dict[str, np.ndarray]:
    """Logical tensors of every kind, by their full names."""
    rng = np.random.default_rng(seed)
    names = [(f"{kind}/{name}", shape) for kind in KINDS for name, shape in shapes.items()]
    return {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in names}


def dealt(arrays: dict[str, np.ndarray], world_size: int, *, cuts: int = 4, seed: int = 0) -> list[list[Piece]]:
    """The arrays cut at random and dealt out to ranks."""
    rng = random.Random(seed)
    hands: list[list[Piece]] = [[] for _ in range(world_size)]
    for name, array in arrays.items():
        for offset, shape in random_cut(array.shape, cuts, rng):
            rng.choice(hands).append(piece(name, array, offset, shape))
    return hands


def write_checkpoint(
    folder: Path, hands: list[list[Piece]], *, block_bytes: int | None = None, **changes: object
) -> list[FileEntry]:
    """A committed checkpoint of one file a hand; nothing is checked, so it may be a wrong one."""
    folder.mkdir(parents=True)
    entries = [
        write_file(folder / f"rank-{rank:05d}.safetensors", pieces, block_bytes) for rank, pieces in enumerate(hands)
    ]
    manifest(files=entries, **changes).save(folder)
    return entries


def flip_bit(path: Path, byte: int) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 1
    path.write_bytes(data)


def flat_ranges(size: int, count: int, rng: random.Random) -> Iterator[tuple[int, int]]:
    for _ in range(count):
        start, end = sorted(rng.randint(0, size) for _ in range(2))
        yield start, end

"""A byte-level tokenizer with an image token, small images of one colour, and lines that name them."""

import io
import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gpt4moe.data.catalogue import Source
from gpt4moe.data.tokenizer import load_tokenizer, train_tokenizer

VOCAB_SIZE = 300


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    texts = [f"word{i} and other_{i % 7} things, 12 + {i}?\n" for i in range(200)]
    train_tokenizer(texts, vocab_size=VOCAB_SIZE, special=["<image>"]).backend.save(str(path))
    return path


def image(number: int, kind: str = "PNG", size: tuple[int, int] = (8, 6), mode: str = "RGB", **options: Any) -> bytes:
    """A file of one colour, which its number decides."""
    stream = io.BytesIO()
    colour = (number % 256, number // 256, 100)
    Image.new("RGB", size, colour).convert(mode).save(stream, kind, **options)
    return stream.getvalue()


def write_lines(path: Path, rows: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def pairs(folder: Path, count: int, make: Callable[[int], bytes] = image) -> Path:
    """A jsonl of `count` pairs, image n of colour n beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        (folder / f"{number}.png").write_bytes(make(number))
    rows = [{"image": f"{number}.png", "caption": f"thing {number}"} for number in range(count)]
    return write_lines(folder / "pairs.jsonl", rows)


def words(tokenizer: Path, out: Path, source: object, *more: str) -> list[str]:
    return ["--tokenizer", str(tokenizer), "--out", str(out), "--source", f"a={source}", "--held-out", "0.2", *more]


def documents(source: Source, split: str, tokenizer: Path) -> list[tuple[str, list[list[bytes]]]]:
    """The text of each document, and the bytes of the frames of its images."""
    found = load_tokenizer(tokenizer)
    stream, store, frames = source.tokens(split), source.images(split), source.frames(split)
    bounds = [*np.flatnonzero(stream.begins(slice(0, len(stream)))).tolist(), len(stream)]
    told = []
    for start, stop in pairwise(bounds):
        records = frames.between(start, stop)
        images = [
            [store.read(int(number)) for number in records["image"][records["token"] == place]]
            for place in np.unique(records["token"])
        ]
        told.append((found.decode(stream[start:stop].tolist()), images))
    return told

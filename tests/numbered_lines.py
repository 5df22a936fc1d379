"""A small data folder that tests of several rooms read."""

import zlib
from pathlib import Path

import numpy as np

from gpt4moe.data.blocks import BLOCK_BYTES
from gpt4moe.data.preprocess import SourceText, write_data_folder
from gpt4moe.data.tokenizer import train_tokenizer

VOCABULARY = 300


def numbered_lines(folder: Path) -> Path:
    """Writes one source of 200 numbered lines and its tokenizer of VOCABULARY into `folder`."""
    texts = [f"word {i} and {i * i} other things\n" for i in range(200)]
    train_tokenizer(texts, vocab_size=VOCABULARY).backend.save(str(folder / "tokenizer.json"))
    source = SourceText(train=texts, valid=texts[:20], licence="CC0-1.0", description="numbered lines")
    write_data_folder(folder, {"alpha": source}, folder / "tokenizer.json", lambda amount: None)
    return folder


def plant_token(source: Path, shard: str, place: int, token: int) -> None:
    """Writes a token into a .bin, with the checksum of its block: whoever made it meant it."""
    path = source / f"{shard}.bin"
    tokens, sums = np.fromfile(path, dtype="<u2"), np.fromfile(path.with_suffix(".sums"), dtype="<u4")
    tokens[place] = token
    path.write_bytes(tokens.tobytes())
    data = tokens.tobytes()
    blocks = [zlib.crc32(data[start : start + BLOCK_BYTES]) for start in range(0, len(data), BLOCK_BYTES)]
    sums[: len(blocks)] = blocks  # those of the .idx stand behind
    path.with_suffix(".sums").write_bytes(sums.tobytes())

"""A small tokenizer, and the command as a function."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from gpt4moe.data.tokenizer import train_tokenizer
from tools.tokenize_corpus import main

FIM = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")
TEXTS = [f"document {i} of other things, {'more ' * (i % 5)}\nand ümläut {i * 7919 % 1000}\n" for i in range(400)]


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Byte-level, 320 entries, with the tokens of fill-in-the-middle."""
    path = tmp_path_factory.mktemp("tokenizer") / "t.json"
    train_tokenizer(TEXTS, vocab_size=320, special=FIM).backend.save(str(path))
    return path


@pytest.fixture
def make(tokenizer_path: Path, tmp_path: Path) -> Callable[..., int]:
    """Calls the command with --out tmp_path/out and a tokenizer, where none is given."""

    def call(*arguments: str) -> int:
        given = [*arguments]
        if not any("--out" in word for word in given):
            given.append(f"--out={tmp_path / 'out'}")
        if not any("tokenizer" in word for word in given):
            given.append(f"--tokenizer={tokenizer_path}")
        return main(given)

    return call


def write_lines(path: Path, texts: Sequence[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def tokens_of(source: Path, split: str = "train") -> bytes:
    return b"".join(path.read_bytes() for path in sorted(source.glob(f"{split}-*.bin")))


def files_of(source: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(source.iterdir())}

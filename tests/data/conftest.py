"""A small tokenizer and a data folder of two sources, made once."""

from pathlib import Path

import pytest

from gpt4moe.config.load import load_run_config
from gpt4moe.config.run import RunConfig
from gpt4moe.data.indexed import IndexedTokens
from gpt4moe.data.indexed_writer import SHARD_BYTES
from gpt4moe.data.preprocess import SourceText, write_data_folder
from gpt4moe.data.tokenizer import Tokenizer, train_tokenizer

VOCAB_SIZE = 300
SEQ_LENGTH = 16


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer([f"word{i} and other_{i % 7} things\n" for i in range(200)], vocab_size=VOCAB_SIZE)


@pytest.fixture(scope="session")
def data_folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Do not write into it."""
    folder = tmp_path_factory.mktemp("data")
    return make_folder(folder, tokenizer)


@pytest.fixture
def in_shards(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    """Sources of several shards each, which a test may damage."""
    return make_folder(tmp_path / "data", tokenizer, shard_bytes=300)


def make_folder(folder: Path, tokenizer: Tokenizer, *, shard_bytes: int = SHARD_BYTES) -> Path:
    def texts(word: str, count: int) -> list[str]:
        return [f"{word} {i} and {i * i} other things\n" for i in range(count)]

    folder.mkdir(exist_ok=True)
    tokenizer.backend.save(str(folder / "tokenizer.json"))
    sources = {
        "alpha": SourceText(train=texts("word", 40), valid=texts("ward", 6), licence="CC0-1.0", description="a"),
        "beta": SourceText(train=texts("thing", 20), valid=texts("thong", 6), licence="CC0-1.0", description="b"),
    }
    write_data_folder(folder, sources, folder / "tokenizer.json", lambda amount: None, shard_bytes=shard_bytes)
    return folder


def shard(folder: Path, source: str, split: str) -> IndexedTokens:
    """The first shard of a source."""
    return IndexedTokens(folder / source / f"{split}-00000")


def small_run(folder: Path | None, *overrides: str) -> RunConfig:
    """A run of the tiny experiment on that folder, or on synthetic tokens."""
    data = ["data=mock"] if folder is None else [f"data.path={folder}"]
    sizes = [f"model.vocab_size={VOCAB_SIZE}", f"model.seq_length={SEQ_LENGTH}"]
    return load_run_config(["+experiment=tiny", "run.name=t", *data, *sizes, *overrides])

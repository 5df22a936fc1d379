"""Runs and data that several tests compare with; nobody writes into them."""

from pathlib import Path

import pytest

from gpt4moe.data.preprocess import SourceText, write_data_folder
from gpt4moe.data.tokenizer import train_tokenizer
from tests.training.command import train

CORPUS_VOCABULARY = 300


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of ten steps in one go, on one rank; checkpoints of steps 5 and 10."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    (ended,) = train(folder, "training.steps=10", "checkpoint.every=5", "checkpoint.keep=0")
    assert ended.status == 0, ended.err
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder of one source, with a vocabulary of CORPUS_VOCABULARY."""
    folder = tmp_path_factory.mktemp("corpus")
    texts = [f"word {i} and {i * i} other things\n" for i in range(200)]
    train_tokenizer(texts, vocab_size=CORPUS_VOCABULARY).backend.save(str(folder / "tokenizer.json"))
    source = SourceText(train=texts, valid=texts[:20], licence="CC0-1.0", description="numbered lines")
    write_data_folder(folder, {"alpha": source}, folder / "tokenizer.json", lambda amount: None)
    return folder

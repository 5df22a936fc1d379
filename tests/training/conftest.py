"""Runs and data that several tests compare with; nobody writes into them."""

from pathlib import Path

import pytest

from tests.numbered_lines import numbered_lines
from tests.training.command import train


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of ten steps in one go, on one rank; checkpoints of steps 5 and 10."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    (ended,) = train(folder, "training.steps=10", "checkpoint.every=5", "checkpoint.keep=0")
    assert ended.status == 0, ended.err
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder of one source, with a vocabulary of tests.corpus.VOCABULARY."""
    return numbered_lines(tmp_path_factory.mktemp("corpus"))

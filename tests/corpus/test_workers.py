"""A process that dies is told in two lines, also where the next task is handed over."""

import os
import time
from pathlib import Path

import pytest

from gpt4moe.corpus.piece import Kitchen, Recipe
from gpt4moe.corpus.records import Advance
from gpt4moe.corpus.workers import Workers
from gpt4moe.errors import DataError


def die(kitchen: Kitchen, advance: Advance, number: int) -> None:
    os._exit(1)


def test_a_killed_process_is_an_error_with_a_cure_also_at_the_next_task(tokenizer_path: Path) -> None:
    recipe = Recipe(tokenizer=str(tokenizer_path), tokenizer_sha256="", library="tokenizers")
    with Workers(2, recipe) as workers:
        with pytest.raises(DataError, match="was killed"):
            list(workers.map(die, [(0,)], lambda amount: None))
        time.sleep(0.1)
        with pytest.raises(DataError, match="was killed"):  # at submit: the pool is broken
            list(workers.map(die, [(1,)], lambda amount: None))

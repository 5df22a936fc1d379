"""The fork server finds what it preloads, and nothing of that is left in this process's variables."""

import os

from gpt4moe.parallel.environment import Environment
from tests.spawn import run_ranks


def _preloaded(environment: Environment) -> bool:
    import sys

    return "gpt4moe.train" in sys.modules


def test_ranks_start_with_what_was_preloaded_and_other_children_see_nothing_of_it() -> None:
    before = os.environ.get("PYTHONPATH")
    assert run_ranks(1, _preloaded)[0]
    assert os.environ.get("PYTHONPATH") == before

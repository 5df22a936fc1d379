"""run_ranks for tests: parallel.local_ranks, with what the tests import loaded once; a failed rank fails the test."""

from collections.abc import Callable
from typing import Any

from gpt4moe.parallel import local_ranks
from gpt4moe.parallel.environment import Environment

local_ranks.preload("tests.preload")


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout_seconds: float = 240) -> list[Any]:
    """What `function(environment, *args)` returned on each rank. Each begins with the same seed: what the ranks' server
    has imported leaves another one each time.

    Args:
        function: importable (top level of a module); its result and arguments travel by pipe.
    Raises: AssertionError with the first failing rank's traceback, or after the timeout.
    """
    try:
        return local_ranks.run_ranks(world_size, _seeded, function, *args, timeout_seconds=timeout_seconds)
    except local_ranks.RanksFailed as failed:
        raise AssertionError(failed.cause) from None


def _seeded(environment: Environment, function: Callable[..., Any], *args: Any) -> Any:
    import torch

    torch.manual_seed(0)
    return function(environment, *args)

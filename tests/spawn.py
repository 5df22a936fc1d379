"""run_ranks for tests: gpt4moe.proof.launch, with what the tests import loaded once; a failed rank fails the test."""

from collections.abc import Callable
from typing import Any

from gpt4moe.proof import launch

launch.preload("tests.preload")


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout_seconds: float = 240) -> list[Any]:
    """What `function(environment, *args)` returned on each rank.

    Args:
        function: importable (top level of a module); its result and arguments travel by pipe.
    Raises: AssertionError with the first failing rank's traceback, or after the timeout.
    """
    try:
        return launch.run_ranks(world_size, function, *args, timeout_seconds=timeout_seconds)
    except launch.RanksFailed as failed:
        raise AssertionError(failed.cause) from None

"""Times contenders in turns, so that a busy moment slows all of them: step by step, or in blocks of several steps."""

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import TypeVar

K = TypeVar("K")
"""A contender's name."""


def interleaved(
    contenders: Mapping[K, Callable[[], object]], rounds: int, *, warmup: int = 2, alone: bool = True,
    before: Callable[[], object] = lambda: None,
) -> dict[K, list[float]]:  # fmt: skip
    """Seconds of each contender in each round; the first `warmup` rounds are not counted.

    Args:
        before: called before each contender, in time that is not counted.
        alone: seconds by the clock. False on a machine that others use too: seconds this process was given, to be
            used with one thread (two would wait for each other).
    """
    clock = time.perf_counter if alone else time.process_time
    seconds: dict[K, list[float]] = {name: [] for name in contenders}
    for turn in range(warmup + rounds):
        for name, run in contenders.items():
            before()
            start = clock()
            run()
            if turn >= warmup:
                seconds[name].append(clock() - start)
    return seconds


def in_blocks(
    contenders: Mapping[str, Callable[[], object]], rounds: int, *, steps: int = 4, alone: bool = True
) -> dict[str, list[float]]:
    """Seconds of each contender in each round: the median of `steps` in a row, after one that is not counted.

    Whoever runs after another finds caches and memory as the other left them; after one step of its own it does not.
    The order turns round from one round to the next. `alone` as in interleaved.
    """
    clock = time.perf_counter if alone else time.process_time
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds):
        for name in list(contenders)[:: -1 if turn % 2 else 1]:
            contenders[name]()
            block = []
            for _ in range(steps):
                start = clock()
                contenders[name]()
                block.append(clock() - start)
            seconds[name].append(median(block))
    return seconds


def ratio(seconds: list[float], baseline: list[float]) -> float:
    """The median over rounds of this contender's time over the baseline's in the same round."""
    return median(mine / theirs for mine, theirs in zip(seconds, baseline, strict=True))

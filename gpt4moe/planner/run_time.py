"""Days of a whole run: its steps, the saves between them, and what unexpected stops cost.

steps x (step + save / interval) / (1 - failures an hour x (restart + half an interval of work done again))
"""

from dataclasses import dataclass
from math import sqrt

from gpt4moe.errors import ConfigError

HOST_COPY_RATE = 20e9
"""Bytes per second from a device to host memory (PCIe 4.0 x16, of which 80% arrives): an assumption."""
STORAGE_RATE = 1e9
"""Bytes per second that a device's share of the storage takes: an assumption (docs/planner.md)."""
MOST_LOST = 0.9
"""Share of the time lost to failures beyond which a plan is refused: the run would hardly move."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Saving:
    """How a run saves its state."""

    every_steps: int
    """0: only at the end."""
    seconds: float
    """That training waits for one save."""
    written_seconds: float = 0.0
    """Until an asynchronous save is in storage, which the next one waits for; 0: it is when training goes on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunTime:
    """The whole run, and what a step's share of its stops is."""

    seconds: float
    checkpoint_seconds: float
    """A step's share of saving."""
    failure_seconds: float
    """A step's share of restarts and of work done again."""
    failures: float
    """Unexpected stops over the run."""


def save_seconds(bytes_per_device: float, *, asynchronous: bool) -> float:
    """What a save holds training up: a copy to the host, or the whole way to storage."""
    return bytes_per_device / (HOST_COPY_RATE if asynchronous else STORAGE_RATE)


def run_time(
    steps: int, step_seconds: float, saving: Saving, *, failures_per_hour: float, restart_seconds: float
) -> RunTime:
    """The time of `steps` steps.

    Raises: ConfigError where failures eat the run up; the cure names an interval that does not.
    """
    every = saving.every_steps or steps
    # An asynchronous save that is still being written when the next one is due holds training up.
    late = max(0.0, saving.written_seconds - every * step_seconds)
    checkpoint = (saving.seconds + late) / every
    work = step_seconds + checkpoint
    rate = failures_per_hour / 3600
    lost = rate * (restart_seconds + every * work / 2)
    if lost > MOST_LOST:
        best = best_interval(saving.seconds, rate, work)
        raise ConfigError(
            f"checkpoint.every={saving.every_steps} is {every * work / 3600:.3g} h of work, but a stop is expected "
            f"every {1 / failures_per_hour:.3g} h: the run would not end.",
            f"Set checkpoint.every={best} or so, use fewer devices, or set restart_minutes lower.",
        )
    seconds = steps * work / (1 - lost)
    return RunTime(
        seconds=seconds,
        checkpoint_seconds=checkpoint,
        failure_seconds=work * lost / (1 - lost),
        failures=seconds * rate,
    )


def best_interval(save: float, failures_per_second: float, step_seconds: float) -> int:
    """Steps between saves that lose the least (Young 1974): sqrt(2 x save / rate), a save being a second at least."""
    return max(1, round(sqrt(2 * max(save, 1.0) / failures_per_second) / step_seconds))

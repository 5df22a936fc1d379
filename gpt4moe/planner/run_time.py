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
    if not lost <= MOST_LOST:
        raise ConfigError(*_endless(steps, step_seconds, saving, rate, restart_seconds))
    seconds = steps * work / (1 - lost)
    return RunTime(
        seconds=seconds,
        checkpoint_seconds=checkpoint,
        failure_seconds=work * lost / (1 - lost),
        failures=seconds * rate,
    )


def _endless(steps: int, step: float, saving: Saving, rate: float, restart: float) -> tuple[str, str]:
    """Cause and cure of a run that failures eat up; the interval is named where one ends it as it stands."""
    every = saving.every_steps or steps
    cause = (
        f"Unexpected stops are {1 / (3600 * rate):.3g} h apart; each costs {restart / 60:.3g} min to restart and half "
        f"of checkpoint.every={saving.every_steps} ({every * step / 3600:.3g} h of work): the run would not end."
    )
    best = best_interval(saving.seconds, rate, step)
    less = int(MOST_LOST / 4 / rate / 6) / 10  # minutes, in tenths: a quarter of what may be lost
    for minutes, also in ((restart / 60, ""), (less, f" and restart_minutes={less:g}")):
        for tried in sorted({best, max(1, best // 2), 2 * best, 1}, key=lambda number: abs(number - best)):
            late = max(0.0, saving.written_seconds - tried * step)
            work = step + (saving.seconds + late) / tried
            if rate * (60 * minutes + tried * work / 2) <= MOST_LOST:
                return cause, f"Set checkpoint.every={tried}{also}, or use fewer devices."
    return cause, "Use fewer devices, or set cluster.hours_between_failures to what your devices have."


def best_interval(save: float, failures_per_second: float, step_seconds: float) -> int:
    """Steps between saves that lose the least (Young 1974): sqrt(2 x save / rate), a save being a second at least."""
    return max(1, round(sqrt(2 * max(save, 1.0) / failures_per_second) / step_seconds))

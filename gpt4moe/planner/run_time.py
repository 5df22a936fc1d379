"""Days, money and energy of a whole run: its steps, the saves between them, and unexpected stops.

steps x (step + save / interval) / (1 - failures an hour x (restart + half an interval of work done again))
"""

from dataclasses import dataclass
from math import sqrt

from gpt4moe.config.cluster import ClusterConfig
from gpt4moe.errors import ConfigError

HOST_COPY_RATE = 20e9
"""Bytes per second from a device to host memory (PCIe 4.0 x16, of which 80% arrives): an assumption."""
STORAGE_RATE = 1e9
"""Bytes per second to storage for each device: an assumption (docs/planner.md)."""
MOST_LOST = 0.9
"""If failures take a larger share of the time than this, the plan is refused: the run would hardly advance."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Saving:
    """How a run saves its state."""

    every_steps: int
    """0: only at the end."""
    seconds: float
    """How long training waits for one save."""
    written_seconds: float = 0.0
    """Until an asynchronous save is in storage, which the next save waits for; 0 for a synchronous save."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunTime:
    """Seconds of the whole run, and what saves and failures add to each step."""

    seconds: float
    checkpoint_seconds: float
    """Of saving, for each step."""
    failure_seconds: float
    """Of restarts and work done again, for each step."""
    failures: float
    """Unexpected stops over the run."""


def save_seconds(bytes_per_device: float, *, asynchronous: bool) -> float:
    """How long a save stops training: the copy to the host if asynchronous, else the whole way to storage."""
    return bytes_per_device / (HOST_COPY_RATE if asynchronous else STORAGE_RATE)


def run_time(
    steps: int, step_seconds: float, saving: Saving, *, failures_per_hour: float, restart_seconds: float
) -> RunTime:
    """The time of `steps` steps.

    Raises: ConfigError where failures cost more time than there is; the cure names an interval that works.
    """
    every = saving.every_steps or steps
    # If an asynchronous save is still being written when the next one is due, training waits.
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
    """Cause and cure of a run that would not end. The cure names a save interval if one is enough."""
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
    """Steps between saves that lose the least time: sqrt(2 x save / rate), a save taking at least 1 s (Young 1974)."""
    return max(1, round(sqrt(2 * max(save, 1.0) / failures_per_second) / step_seconds))


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """Of a run: device hours times the cluster's price and power."""

    usd: float
    gpu_hours: float
    kwh: float | None
    """Devices with their servers, without the cooling of the hall; None: the cluster's power is not known."""


def cost(cluster: ClusterConfig, devices: int, hours: float) -> Cost:
    """The cost of `devices` for `hours`. Raises: ConfigError where the cluster has no price."""
    gpu_hours = devices * hours
    kwh = None if cluster.watts is None else gpu_hours * cluster.watts / 1000
    return Cost(usd=gpu_hours * hourly_price(cluster), gpu_hours=gpu_hours, kwh=kwh)


def hourly_price(cluster: ClusterConfig) -> float:
    """USD of one device for one hour. Raises: ConfigError where none is known."""
    if cluster.usd_per_hour is None:
        raise ConfigError(
            f"cluster={cluster.name} has no price (cluster.usd_per_hour is null).",
            "Set cluster.usd_per_hour to what you pay for a device and hour; configs/cluster has 1.10 for a100_80g, "
            "2.50 for h100_80g, 4.54 for gb200.",
        )
    return cluster.usd_per_hour

"""Days, money and energy of a whole run: its steps, the saves between them, and unexpected stops.

steps x (step + save / interval) / (1 - failures an hour x (restart + half an interval of work done again))
"""

from dataclasses import dataclass
from math import sqrt

from gpt4moe.config.cluster import ClusterConfig
from gpt4moe.errors import ConfigError

HOST_COPY_RATE = 20e9
"""Bytes per second from a device to host memory: an assumption, 80% of PCIe 4.0 x16."""
STORAGE_RATE = 1e9
"""Bytes per second that each device writes to storage: an assumption (docs/planner.md)."""
MOST_LOST = 0.9
"""A plan is refused if failures take a larger share of the time than this, because the run would hardly advance."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Saving:
    """How a run saves its state."""

    every_steps: int
    """Steps between saves. 0: the run saves only at its end."""
    seconds: float
    """Seconds that training waits for one save."""
    written_seconds: float = 0.0
    """Seconds until an asynchronous save is in storage; the next save waits for that. 0 for a synchronous save."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunTime:
    """Seconds of the whole run, and the seconds that saves and failures add to each step."""

    seconds: float
    checkpoint_seconds: float
    """Seconds of saving, spread over the steps: seconds for each step."""
    failure_seconds: float
    """Seconds of restarts and repeated work, spread over the steps."""
    failures: float
    """Expected number of unexpected stops in the run."""


def save_seconds(bytes_per_device: float, *, asynchronous: bool) -> float:
    """Seconds that a save stops training: the copy to host memory if asynchronous, else the write to storage."""
    return bytes_per_device / (HOST_COPY_RATE if asynchronous else STORAGE_RATE)


def run_time(
    steps: int,
    step_seconds: float,
    saving: Saving,
    *,
    failures_per_hour: float,
    restart_seconds: float,
    detect_seconds: float = 0.0,
) -> RunTime:
    """The time of `steps` steps.

    Args:
        restart_seconds, detect_seconds: of each stop, one after the other; apart, so that a cure can name either.
    Raises: ConfigError if failures cost more time than the run has. The cure names a save interval that works.
    """
    every = saving.every_steps or steps
    # If an asynchronous save is still being written when the next one is due, training waits.
    late = max(0.0, saving.written_seconds - every * step_seconds)
    checkpoint = (saving.seconds + late) / every
    work = step_seconds + checkpoint
    rate = failures_per_hour / 3600
    lost = rate * (detect_seconds + restart_seconds + every * work / 2)
    if not lost <= MOST_LOST:
        raise ConfigError(*_endless(steps, step_seconds, saving, rate, restart_seconds, detect_seconds))
    seconds = steps * work / (1 - lost)
    return RunTime(
        seconds=seconds,
        checkpoint_seconds=checkpoint,
        failure_seconds=work * lost / (1 - lost),
        failures=seconds * rate,
    )


def _endless(steps: int, step: float, saving: Saving, rate: float, restart: float, detect: float) -> tuple[str, str]:
    """(cause, cure) for a run that would never end. The cure names a save interval if that is enough, or else with it
    shorter restarts, a faster notice, or both."""
    every = saving.every_steps or steps
    noticed = f"{detect / 60:.3g} min until it is noticed (detect_seconds), " if detect else ""
    cause = (
        f"Unexpected stops are {1 / (3600 * rate):.3g} h apart; each costs {noticed}{restart / 60:.3g} min to restart "
        f"and half of checkpoint.every={saving.every_steps} ({every * step / 3600:.3g} h of work): the run would not "
        "end."
    )
    best = best_interval(saving.seconds, rate, step)
    both = MOST_LOST / 4 / rate  # seconds for notice and restart: a quarter of MOST_LOST
    minutes, half = int((both - detect) / 6) / 10, int(both / 12) / 10  # rounded down to tenths
    found, split = int(both - restart), int(both / 2)
    changes = [(detect + restart, "")]
    if minutes > 0:
        changes.append((detect + 60 * minutes, f" and restart_minutes={minutes:g}"))
    if detect and found > 0:
        changes.append((found + restart, f" and detect_seconds={found}"))
    if detect and split and half:
        changes.append((split + 60 * half, f" and detect_seconds={split} and restart_minutes={half:g}"))
    for stopped, also in changes:
        for tried in sorted({best, max(1, best // 2), 2 * best, 1}, key=lambda number: abs(number - best)):
            late = max(0.0, saving.written_seconds - tried * step)
            work = step + (saving.seconds + late) / tried
            if rate * (stopped + tried * work / 2) <= MOST_LOST:
                return cause, f"Set checkpoint.every={tried}{also}, or use fewer devices."
    return cause, "Use fewer devices, or set cluster.hours_between_failures to what your devices have."


def best_interval(save: float, failures_per_second: float, step_seconds: float) -> int:
    """Steps between saves that lose the least time: sqrt(2 x save / rate), Young 1974. A save counts as 1 s or more."""
    return max(1, round(sqrt(2 * max(save, 1.0) / failures_per_second) / step_seconds))


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """Cost of a run: device hours times the cluster's price and power."""

    usd: float | None
    """None: the cluster has no price."""
    gpu_hours: float
    kwh: float | None
    """Energy of the devices and their servers, without the cooling of the building; None if the power is not known."""


def cost(cluster: ClusterConfig, devices: int, hours: float) -> Cost:
    """The cost of `devices` for `hours`."""
    gpu_hours = devices * hours
    kwh = None if cluster.watts is None else gpu_hours * cluster.watts / 1000
    usd = None if cluster.usd_per_hour is None else gpu_hours * cluster.usd_per_hour
    return Cost(usd=usd, gpu_hours=gpu_hours, kwh=kwh)


def hourly_price(cluster: ClusterConfig) -> float:
    """USD for one device and hour, where money is the question. Raises: ConfigError if the cluster has no price."""
    if cluster.usd_per_hour is None:
        raise ConfigError(
            f"cluster={cluster.name} has no price (cluster.usd_per_hour is null).",
            "Set cluster.usd_per_hour to what you pay for a device and hour; configs/cluster has 1.10 for a100_80g, "
            "2.50 for h100_80g, 4.54 for gb200.",
        )
    return cluster.usd_per_hour

"""What a run uses: time left, share of the devices' peak, device hours and money. Metrics declared and made.

records of earlier launches -> hours, money so far --+ this process's age x ranks--> device_hours, cost_usd
"""

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from gpt4moe.config.step_sizes import StepSizes
from gpt4moe.runlog.metrics import Metric, Record

WINDOW_STEPS = 50

USAGE_METRICS: dict[str, Metric] = {
    "mfu": Metric(
        unit="share",
        meaning="model FLOPs (architecture.flops: attention counted, recomputation and gradients of frozen weights "
        "not) over the cluster's dense peak in the run's precision; only where cluster=... describes the devices the "
        "run is on; nominal on a CPU",
        is_timing=True,
    ),
    "peak_memory_bytes": Metric(
        unit="bytes",
        meaning="most memory a rank has had so far, of the fullest rank: allocated tensors on a GPU, the process's "
        "resident set on a CPU",
        is_timing=True,
    ),
    "device_hours": Metric(
        unit="h",
        meaning="devices times hours over all launches, start-up and redone steps included; what a killed launch did "
        "after its last recorded step is not; a copied run folder under a new name begins at 0",
        is_timing=True,
    ),
    "cost_usd": Metric(
        unit="USD",
        meaning="device_hours times cluster.usd_per_hour; only where cluster=... describes the devices and has a price",
        is_timing=True,
    ),
    "other_seconds": Metric(
        unit="s",
        meaning="outside the step, since the last one was recorded: evaluation, the last step's checkpoint, logs; not "
        "on a launch's first step",
        is_timing=True,
    ),
    "eta_seconds": Metric(
        unit="s",
        meaning="time to training.steps at the pace of the last 50 steps, by tokens, evaluations and checkpoints "
        "included; not on a launch's first step",
        is_timing=True,
    ),
}
"""All made by Usage but peak_memory_bytes, which every rank measures (training/callbacks/saving.py)."""


class Pace:
    """How fast steps go by in one launch, and when the last one will be done: evaluations and checkpoints included.

    Args:
        clock: seconds.
        tokens: of the first N steps, where steps differ in size (StepSizes.tokens); None: all have one.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, tokens: Callable[[int], int] | None = None):
        self._clock, self._work = clock, tokens or int
        self._marks: deque[tuple[float, int]] = deque(maxlen=WINDOW_STEPS)

    def mark(self, step: int) -> float:
        """Notes that `step` is done now. Returns: the clock's time."""
        now = self._clock()
        self._marks.append((now, step))
        return now

    def eta_seconds(self, total_steps: int) -> float | None:
        """Seconds to the end of step `total_steps` at the last steps' pace by tokens; None before two are noted."""
        if len(self._marks) < 2:
            return None
        (first_time, first_step), (last_time, last_step) = self._marks[0], self._marks[-1]
        first, last, end = self._work(first_step), self._work(last_step), self._work(total_steps)
        return (last_time - first_time) / (last - first) * (end - last)


@dataclass(frozen=True, kw_only=True, slots=True)
class Devices:
    """What the run is on."""

    count: int
    peak_flops: float | None
    """Of all of them together, dense, in the run's precision; None: cluster=... describes other devices."""
    usd_per_hour: float | None
    """Of one; None: no price."""


class Usage:
    """Makes USAGE_METRICS in one launch of a run.

    Args:
        began: when this process began, seconds since 1970.
        sizes: of the run's steps.
        flops_per_token: of the model, forward and backward, by the length of a sample.
        earlier: records of the launches before, those of redone steps included: they cost money too. In a run folder
            copied from another run only this run's own.
    """

    def __init__(
        self,
        devices: Devices,
        *,
        began: float,
        sizes: StepSizes,
        flops_per_token: Mapping[int, float],
        total_steps: int,
        earlier: Sequence[Record],
    ):
        self.devices = devices
        self.began = began
        self.sizes, self.flops_per_token = sizes, flops_per_token
        self.total_steps = total_steps
        self.earlier_device_hours = max((record.get("device_hours", 0.0) for record in earlier), default=0.0)
        self.earlier_usd = max((record.get("cost_usd", 0.0) for record in earlier), default=0.0)
        self._pace = Pace(tokens=sizes.tokens)
        self._last_time: float | None = None

    def add_to(self, record: Record) -> None:
        """Adds the metrics of the step just done."""
        now = self._pace.mark(int(record["step"]))
        if self._last_time is not None:
            record["other_seconds"] = max(0.0, now - self._last_time - record["step_seconds"])
        self._last_time = now
        eta = self._pace.eta_seconds(self.total_steps)
        if eta is not None:
            record["eta_seconds"] = eta
        hours = self.devices.count * (time.time() - self.began) / 3600
        record["device_hours"] = self.earlier_device_hours + hours
        if self.devices.peak_flops is None:
            return
        flops_per_token = self.flops_per_token[self.sizes.at_step(int(record["step"])).seq_length]
        record["mfu"] = flops_per_token * record["tokens_per_second"] / self.devices.peak_flops
        if self.devices.usd_per_hour is not None:
            record["cost_usd"] = self.earlier_usd + hours * self.devices.usd_per_hour

"""Alerts: pure functions over the values of one metric, and the memory of which of them are on.

    record of a step --Watch.step--> rules with a new value --> what began to be wrong
    no step for a while --Watch.idle--> stalled rules        --> what began to be wrong (waits.py: for what it waits)

A rule says in words what is wrong, or None. An alert tells once, when it begins, and is armed again when its rule is
content. Training evaluates them (training/callbacks/alerts.py); `standing` answers for a metrics.jsonl as it lies.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Protocol

from gpt4moe.runlog.console import clock_time
from gpt4moe.runlog.metrics import Record

# Of normally distributed values the standard deviation is 1.4826 times the median distance from the median.
_SPREAD = 1.4826
# A curve calmer than this share of its height spikes at every breath.
_LEAST_SPREAD = 0.005


@dataclass(frozen=True, slots=True)
class Idle:
    """That no step ends, since when, and what training waits for."""

    seconds: float = 0.0
    kind: str = ""
    """start_up, checkpoint, evaluation ...; nothing: for the step itself."""
    longest_seconds: float = 0.0
    """That one of this kind took before; 0: there was none."""

    @property
    def what(self) -> str:
        return self.kind.replace("_", "-")


_BUSY = Idle()


class Rule(Protocol):
    @property
    def memory(self) -> int:
        """How many values it looks back on."""

    def check(self, values: Sequence[float], idle: Idle) -> str | None:
        """What is wrong, or None.

        Args:
            values: of the metric, the last one newest; as many as there are yet.
            idle: since the last step was done.
        """


@dataclass(frozen=True, kw_only=True, slots=True)
class Spike:
    """The last value stands above the median of those before by many times their usual distance from it."""

    steps: int
    times: float

    @property
    def memory(self) -> int:
        return self.steps + 1

    def check(self, values: Sequence[float], idle: Idle) -> str | None:
        before, last = values[:-1], values[-1] if values else 0.0
        if not math.isfinite(last):
            return f"it is {last}"
        if len(before) < self.steps:
            return None
        usual = median(before)
        spread = max(_SPREAD * median(abs(value - usual) for value in before), _LEAST_SPREAD * abs(usual))
        if last <= usual + self.times * spread:
            return None
        return f"{last:.4g}, where {usual:.4g} +- {spread:.2g} was usual in the last {self.steps} steps"


@dataclass(frozen=True, kw_only=True, slots=True)
class StaysAbove:
    """Every one of the last values is above the limit."""

    limit: float
    steps: int

    @property
    def memory(self) -> int:
        return self.steps

    def check(self, values: Sequence[float], idle: Idle) -> str | None:
        last = values[-self.steps :]
        if len(last) < self.steps or min(last) <= self.limit:
            return None
        return f"{last[-1]:g}, above {self.limit:g} for {self.steps} steps"


@dataclass(frozen=True, kw_only=True, slots=True)
class Drop:
    """The median of a few recent values is below that of those before by a share of it."""

    steps: int
    recent: int
    share: float

    @property
    def memory(self) -> int:
        return self.steps + self.recent

    def check(self, values: Sequence[float], idle: Idle) -> str | None:
        if len(values) < self.memory:
            return None
        usual, now = median(values[-self.memory : -self.recent]), median(values[-self.recent :])
        if now >= (1 - self.share) * usual:
            return None
        return f"{now:.4g} in the last {self.recent} steps, {usual:.4g} in the {self.steps} before"


@dataclass(frozen=True, kw_only=True, slots=True)
class Plateau:
    """The later half of the values is no lower than the earlier half."""

    steps: int

    @property
    def memory(self) -> int:
        return self.steps

    def check(self, values: Sequence[float], idle: Idle) -> str | None:
        if len(values) < self.steps:
            return None
        half = self.steps // 2
        earlier, later = fmean(values[-self.steps : -half]), fmean(values[-half:])
        if later < earlier:
            return None
        return f"{later:.4g} over the last {half} steps, {earlier:.4g} over the {half} before"


@dataclass(frozen=True, kw_only=True, slots=True)
class Stalled:
    """No step for many times the usual step; its metric is step_seconds.

    A save, an evaluation or a start-up may be much longer than a step, and the first of its kind has none to compare
    with: it is stalled after as many times the longest before, and not before three times the seconds.
    """

    times: float
    seconds: float

    @property
    def memory(self) -> int:
        return 50

    def check(self, values: Sequence[float], idle: Idle) -> str | None:
        if idle.kind:
            if idle.seconds <= max(3 * self.seconds, self.times * idle.longest_seconds):
                return None
            before = f"took {idle.longest_seconds:.3g} s at most" if idle.longest_seconds else "there was none"
            return f"no step for {clock_time(idle.seconds)}: stuck in {idle.what}; before, {before}"
        usual = median(values) if values else 0.0
        if idle.seconds <= max(self.seconds, self.times * usual):
            return None
        return f"no step for {clock_time(idle.seconds)}, where one takes {usual:.3g} s"


RULES: dict[str, type[Rule]] = {
    "spike": Spike, "stays_above": StaysAbove, "drop": Drop, "plateau": Plateau, "stalled": Stalled,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Alert:
    name: str
    metric: str
    rule: Rule


@dataclass(frozen=True, slots=True)
class Told:
    """An alert that has just begun."""

    name: str
    text: str
    """One sentence, with the metric and its numbers."""


class Watch:
    """The alerts of one start of a run, on its logging rank.

    Args:
        earlier: records of the steps before this start, so that windows are not empty after a restart.
    """

    def __init__(self, alerts: Sequence[Alert], earlier: Sequence[Record] = ()):
        self.alerts = alerts
        self._values: list[deque[float]] = [deque(maxlen=alert.rule.memory) for alert in alerts]
        self._is_on = [False] * len(alerts)
        for record in earlier:
            self._take(record)

    def step(self, record: Record) -> list[Told]:
        """After a step."""
        self._take(record)
        new = [alert.metric in record for alert in self.alerts]
        return self._checked(new, _BUSY)

    def idle(self, idle: Idle) -> list[Told]:
        """While no step comes."""
        return self._checked([isinstance(alert.rule, Stalled) for alert in self.alerts], idle)

    def standing(self, idle: Idle) -> list[Told]:
        """What has begun and was not told, of every alert that has a value."""
        waits = [isinstance(alert.rule, Stalled) and bool(idle.kind) for alert in self.alerts]
        return self._checked([bool(values) or wait for values, wait in zip(self._values, waits, strict=True)], idle)

    def _take(self, record: Record) -> None:
        for alert, values in zip(self.alerts, self._values, strict=True):
            if alert.metric in record:
                values.append(record[alert.metric])

    def _checked(self, which: list[bool], idle: Idle) -> list[Told]:
        begun = []
        for place, alert in enumerate(self.alerts):
            if not which[place]:
                continue
            wrong = alert.rule.check(list(self._values[place]), idle)
            if wrong is not None and not self._is_on[place]:
                begun.append(Told(alert.name, f"{alert.metric}: {wrong}"))
            self._is_on[place] = wrong is not None
        return begun


def standing(alerts: Sequence[Alert], records: Sequence[Record], idle: Idle) -> list[Told]:
    """What is wrong now with a run whose steps are `records`: for a look from outside, such as a list of runs."""
    return Watch(alerts, records).standing(idle)

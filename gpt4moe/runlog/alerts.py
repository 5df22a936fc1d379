"""Alerts: rules over the values of one metric, and which alerts are on.

    record of a step --AlertWatch.step--> rules whose metric has a new value --> alerts that begin to fail
    no step for a while --AlertWatch.idle--> stalled rules                   --> alerts that begin to fail

A rule returns in words what is wrong, or None. An alert fires once when its rule starts to fail, and re-arms when it
passes again. Training asks after every step (training/callbacks/alerts.py); `failing_alerts` judges a finished or
running run from its metrics.jsonl.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Protocol

from gpt4moe.runlog.console import clock_time
from gpt4moe.runlog.metrics import Record
from gpt4moe.runlog.waits import Idle

# Of normally distributed values the standard deviation is 1.4826 times the median distance from the median.
_SPREAD = 1.4826
# The least spread, as a share of the median: else a nearly constant curve would count as a spike at every step.
_LEAST_SPREAD = 0.005


_BUSY = Idle()


class AlertRule(Protocol):
    @property
    def memory(self) -> int:
        """How many of the last values it needs."""

    def check(self, values: Sequence[float], idle: Idle) -> str | None:
        """What is wrong, or None.

        Args:
            values: of the metric, oldest first; fewer than `memory` early in a run.
            idle: time since the last step ended.
        """


@dataclass(frozen=True, kw_only=True, slots=True)
class Spike:
    """The last value is above the median of those before by `times` their usual distance from it; or is no number."""

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
    """The median of the `recent` last values is below that of the `steps` before them by `share` of it."""

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
    """No step for `times` the usual step and for `seconds` at least; its metric is step_seconds.

    A save, an evaluation or a start-up may take much longer than a step. It is compared with the longest one of its
    kind before, and it is not stalled before 3 x `seconds`, because the first of its kind has none to compare with.
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


ALERT_RULES: dict[str, type[AlertRule]] = {
    "spike": Spike, "stays_above": StaysAbove, "drop": Drop, "plateau": Plateau, "stalled": Stalled,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Alert:
    name: str
    metric: str
    rule: AlertRule


@dataclass(frozen=True, slots=True)
class FiredAlert:
    """An alert whose rule has just started to fail."""

    name: str
    text: str
    """One sentence, with the metric and its numbers."""


class AlertWatch:
    """The alerts of one launch of a run, on its logging rank.

    Args:
        earlier: records of the steps before this launch, so that windows are not empty after a restart.
    """

    def __init__(self, alerts: Sequence[Alert], earlier: Sequence[Record] = ()):
        self.alerts = alerts
        self._values: list[deque[float]] = [deque(maxlen=alert.rule.memory) for alert in alerts]
        self._is_on = [False] * len(alerts)
        self._seq_length: float | None = None
        for record in earlier:
            self._take(record)

    def step(self, record: Record) -> list[FiredAlert]:
        """Alerts that fire with this step."""
        self._take(record)
        new = [alert.metric in record for alert in self.alerts]
        return self._checked(new, _BUSY)

    def idle(self, idle: Idle) -> list[FiredAlert]:
        """Alerts that fire while no step ends."""
        return self._checked([isinstance(alert.rule, Stalled) for alert in self.alerts], idle)

    def failing(self, idle: Idle) -> list[FiredAlert]:
        """Every alert that has a value and fails now, unless it has fired before."""
        waits = [isinstance(alert.rule, Stalled) and bool(idle.kind) for alert in self.alerts]
        return self._checked([bool(values) or wait for values, wait in zip(self._values, waits, strict=True)], idle)

    def _take(self, record: Record) -> None:
        # Longer samples cost more a token (training.length_ramp): a drop is looked for within one length.
        if record.get("seq_length") != self._seq_length:
            self._seq_length = record.get("seq_length")
            for alert, values in zip(self.alerts, self._values, strict=True):
                if isinstance(alert.rule, Drop):
                    values.clear()
        for alert, values in zip(self.alerts, self._values, strict=True):
            if alert.metric in record:
                values.append(record[alert.metric])

    def _checked(self, which: list[bool], idle: Idle) -> list[FiredAlert]:
        fired = []
        for place, alert in enumerate(self.alerts):
            if not which[place]:
                continue
            wrong = alert.rule.check(list(self._values[place]), idle)
            if wrong is not None and not self._is_on[place]:
                fired.append(FiredAlert(alert.name, f"{alert.metric}: {wrong}"))
            self._is_on[place] = wrong is not None
        return fired


def failing_alerts(alerts: Sequence[Alert], records: Sequence[Record], idle: Idle) -> list[FiredAlert]:
    """Alerts that fail now, of a run whose steps are `records`; for a list of runs."""
    return AlertWatch(alerts, records).failing(idle)

"""The learning rate of a step: linear warm-up, then the schedule's curve. A pure function."""

from collections.abc import Callable
from math import cos, pi

from gpt4moe.config.optimizer import ScheduleConfig, ScheduleKind

# Fraction of the horizon passed, 0..1 -> weight of the peak, 1..0.
_CURVES: dict[ScheduleKind, Callable[[float], float]] = {
    ScheduleKind.cosine: lambda passed: (1 + cos(pi * passed)) / 2,
    ScheduleKind.linear: lambda passed: 1 - passed,
    ScheduleKind.constant: lambda passed: 1.0,
}


def learning_rate(step: int, peak: float, schedule: ScheduleConfig) -> float:
    """The rate of update number `step` (from 1): reaches `peak` at the end of the warm-up, then falls to
    peak * final_fraction at schedule.total_steps and stays."""
    if step <= schedule.warmup_steps:
        return peak * step / schedule.warmup_steps
    horizon = max(1, schedule.total_steps - schedule.warmup_steps)
    passed = min(1.0, (step - schedule.warmup_steps) / horizon)
    weight = _CURVES[schedule.kind](passed)
    return peak * (schedule.final_fraction + (1 - schedule.final_fraction) * weight)

"""The learning rate of a step: linear warm-up, then the curve of the schedule's kind. A pure function of the step.

A new kind is a value of config.optimizer.ScheduleKind, a row of _CURVES and a file of configs/schedule. A setting that
one kind alone reads is a field of ScheduleConfig and an entry of config.optimizer.SCHEDULE_KEYS.
"""

from collections.abc import Callable
from math import cos, pi

from gpt4moe.config.optimizer import ScheduleConfig, ScheduleKind


def learning_rate(step: int, peak: float, schedule: ScheduleConfig) -> float:
    """The learning rate of step number `step`, from 1.

    It rises to `peak` at the end of the warm-up, ends at peak * final_fraction at schedule.total_steps (a constant one
    stays at the peak), and does not change after that.
    """
    if step <= schedule.warmup_steps:
        return peak * step / schedule.warmup_steps
    return peak * _CURVES[schedule.kind](min(step, max(schedule.total_steps, schedule.warmup_steps + 1)), schedule)


def _interpolated(curve: Callable[[float], float]) -> Callable[[int, ScheduleConfig], float]:
    """Between 1 and final_fraction.

    Args:
        curve: share of the steps after the warm-up that have passed, 0 to 1 -> 1 at the peak, 0 at the end.
    """

    def fraction(step: int, schedule: ScheduleConfig) -> float:
        horizon = max(1, schedule.total_steps - schedule.warmup_steps)
        weight = curve((step - schedule.warmup_steps) / horizon)
        return schedule.final_fraction + (1 - schedule.final_fraction) * weight

    return fraction


def _warmup_stable_decay(step: int, schedule: ScheduleConfig) -> float:
    """1 until the last decay_share of total_steps, then an exponential decay to final_fraction.

    Every step of the decay multiplies the learning rate by the same number. MiniCPM, arXiv:2404.06395, section 4, whose
    exponential annealing is 0.5^(steps of the decay / half-life). Here the half-life follows from final_fraction.
    """
    assert schedule.decay_share is not None
    decay_steps = schedule.decay_share * schedule.total_steps
    passed = 1 - (schedule.total_steps - step) / decay_steps
    return float(schedule.final_fraction ** max(0.0, passed))


_CURVES: dict[ScheduleKind, Callable[[int, ScheduleConfig], float]] = {
    ScheduleKind.cosine: _interpolated(lambda passed: (1 + cos(pi * passed)) / 2),
    ScheduleKind.linear: _interpolated(lambda passed: 1 - passed),
    ScheduleKind.constant: _interpolated(lambda passed: 1.0),
    ScheduleKind.wsd: _warmup_stable_decay,
}
"""Kind -> the fraction of the peak at a step after the warm-up, at most total_steps."""

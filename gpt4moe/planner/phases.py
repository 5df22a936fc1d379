"""Time and money of a run whose steps change: ramps of batch and length, and phases of the data.

training.batch_ramp, length_ramp --> spans of steps of one size --run_time--> time of each span --> the run's time
data.phases                      --> the same spans, cut where the shares change --> RunPhase, whose sums are the run
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from gpt4moe.architecture.flops import FlopsPerToken, flops_per_token
from gpt4moe.config.plan import PlanConfig
from gpt4moe.planner.run_time import RunTime, Saving, run_time
from gpt4moe.planner.states import trained_tensors

Seconds = Callable[[PlanConfig], float]
"""Of a step of this plan."""
Memory = Callable[[PlanConfig], int]
"""Bytes of the fullest device in steps of this plan."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunPhase:
    """Steps of a run between two changes. Over all phases steps, tokens and seconds sum up to the run's."""

    first_step: int
    """From 1."""
    steps: int
    global_batch_size: int
    seq_length: int
    shares: dict[str, float] | None
    """Of the sources, as data.phases gives them; None: data.sources."""
    tokens: int
    flops: FlopsPerToken
    """Of samples of this length."""
    peak_memory_bytes: int
    """Of the fullest device."""
    step_seconds: float
    """Of one step, without saving and restarts."""
    seconds: float
    """Of all its steps, with them."""


def timed_phases(
    plan: PlanConfig,
    seconds_of: Seconds,
    memory_of: Memory,
    saving: Saving,
    *,
    failures_per_hour: float,
    restart_seconds: float,
    detect_seconds: float,
) -> tuple[RunTime, list[RunPhase]]:
    """The run's time, and its phases.

    Raises: ConfigError as run_time does.
    """
    total, spans = plan.training.steps, plan.step_sizes.within(plan.training.steps)
    if len(spans) > 1 and not saving.every_steps:  # one save at the end of the run, not one for each span
        saving = replace(saving, every_steps=total)
    times, phases = [], []
    for span, steps in spans:
        part = plan.at_step(span.first_step + 1)
        seconds, memory = seconds_of(part), memory_of(part)
        flops = flops_per_token(part.model, part.parallel, trained=trained_tensors(part))
        took = run_time(
            steps, seconds, saving, failures_per_hour=failures_per_hour, restart_seconds=restart_seconds,
            detect_seconds=detect_seconds,
        )  # fmt: skip
        times.append((steps, took))
        for first, count, shares in _cut_by_shares(plan, span.first_step, steps):
            phases.append(
                RunPhase(
                    first_step=first + 1, steps=count, global_batch_size=span.global_batch_size,
                    seq_length=span.seq_length, shares=shares, tokens=count * span.tokens_per_step,
                    flops=flops, peak_memory_bytes=memory, step_seconds=seconds,
                    seconds=took.seconds * count / steps,
                )
            )  # fmt: skip
    return _together(times), phases


def _cut_by_shares(plan: PlanConfig, first: int, steps: int) -> list[tuple[int, int, dict[str, float] | None]]:
    """(steps before it, steps, shares) of each part of a span with one set of shares.

    The step in which the shares change counts to the phase that it begins with.
    """
    sizes, parts = plan.step_sizes, []
    starts: list[tuple[int, dict[str, float] | None]] = [(0, None)]
    for phase in plan.data.phases:
        whole = sizes.steps(phase.from_tokens)
        starts.append((whole + (sizes.tokens(whole) < phase.from_tokens), phase.shares))
    ends = [start for start, _ in starts[1:]] + [first + steps]
    for (start, shares), end in zip(starts, ends, strict=True):
        begins, stops = max(first, start), min(first + steps, end)
        if begins < stops:
            parts.append((begins, stops - begins, shares))
    return parts


def _together(times: Sequence[tuple[int, RunTime]]) -> RunTime:
    """Spans of (steps, time) as one run."""
    if len(times) == 1:
        return times[0][1]
    total = sum(steps for steps, _ in times)
    return RunTime(
        seconds=sum(took.seconds for _, took in times),
        checkpoint_seconds=sum(steps * took.checkpoint_seconds for steps, took in times) / total,
        failure_seconds=sum(steps * took.failure_seconds for steps, took in times) / total,
        failures=sum(took.failures for _, took in times),
    )

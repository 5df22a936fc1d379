"""One training step, in the one order that the loop, the proof, tests and benchmarks share.

    zero gradients -> pipeline schedule -> reduce -> gradient norm -> verdict -> clip -> update -> routers' buffers
    |<---- twice in a checked step ---->|     |                          |
                                        after_reduce            skip: nothing moves; stop, go_back: raise

The verdict is given by a policy. It sees numbers that are equal on every rank, so every rank gives the same verdict.
training.recheck says which steps are computed twice, and compares.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from math import isfinite

from gpt4moe.config.run import RunConfig
from gpt4moe.data.batch import Batch
from gpt4moe.errors import DivergenceError, GoBack
from gpt4moe.training.learning_rate import learning_rate
from gpt4moe.training.origin import origin
from gpt4moe.training.recheck import Recheck
from gpt4moe.training.step import StepResult, StepRunner


@dataclass(frozen=True, kw_only=True, slots=True)
class StepNumbers:
    """What a policy sees of a step before its update; equal on every rank."""

    step: int
    """From 1."""
    loss: float
    grad_norm: float
    """Global, before clipping."""


class Action(Enum):
    """What is done with the update of a step."""

    go_on = "go_on"
    """Clip and update."""
    skip = "skip"
    """Leave weights, moments and routers' buffers as they are; training goes on with the next step."""
    go_back = "go_back"
    """End the loop on every rank, and go on from an earlier checkpoint; weights and moments stay as they are."""
    stop = "stop"
    """End the run on every rank; weights, moments and buffers stay as they are."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """An action; why, for all but an ordinary step (`cause`); and for stop what a user can do (`cure`)."""

    action: Action
    cause: str = ""
    cure: str = ""


GO_ON = Verdict(Action.go_on)
_ENDS = {Action.stop: DivergenceError, Action.go_back: GoBack}
Policy = Callable[[StepNumbers, RunConfig], Verdict]


def stop_on_nonfinite(numbers: StepNumbers, run: RunConfig) -> Verdict:
    """The policy where no other is given. That of a run is training.watch.Watch."""
    return GO_ON if isfinite(numbers.grad_norm) and isfinite(numbers.loss) else stop(numbers, run, nonfinite(numbers))


def nonfinite(numbers: StepNumbers) -> str:
    return f"loss {numbers.loss} and gradient norm {numbers.grad_norm}"


def stop(numbers: StepNumbers, run: RunConfig, what: str) -> Verdict:
    """The verdict that ends a run at a step that has `what`."""
    return Verdict(
        Action.stop,
        f"Step {numbers.step} has {what}; the weights were not touched.",
        f"Lower optimizer.lr={run.optimizer.lr:g} or optimizer.clip_norm, and start again: the run goes on "
        "from its last checkpoint, where it has one.",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class StepOutcome:
    """The result of a step, taken or skipped. All but the seconds is equal on every rank."""

    result: StepResult
    grad_norm: float
    """Global, before clipping."""
    learning_rate: float
    """Of this step's update, whether it was made or skipped."""
    verdict: Verdict
    """Go on or skip; the others raise."""
    forward_backward_seconds: float
    optimizer_seconds: float
    """From the end of the schedule to the end of the update."""
    check_seconds: float = 0.0
    """Of a step that was computed twice: the first pass and the comparisons. Of another: next to nothing."""

    @property
    def is_updated(self) -> bool:
        return self.verdict.action is Action.go_on


def train_step(
    runner: StepRunner,
    step: int,
    batches: list[Batch],
    *,
    policy: Policy = stop_on_nonfinite,
    after_reduce: Callable[[], None] | None = None,
    update: Callable[[float], None] | None = None,
    check: Recheck | None = None,
) -> StepOutcome:
    """Takes training step number `step`, from 1. Collective.

    A skipped step counts as a step: its samples are consumed, and the learning rate moves on. Only the optimizer's
    count of updates (Adam's bias correction) does not change.

    Args:
        batches: this rank's micro-batches, the same number on every rank.
        policy: gives the verdict, by the same numbers on every rank.
        after_reduce: called when the reduced gradients are ready in engine.owned(), not clipped yet.
        update: replaces the optimizer's update (engine.update); gets the learning rate.
        check: says whether the step is computed twice and compared.
    Raises: on every rank: DivergenceError when the verdict is to stop; GoBack, which is one, when it is to go back;
        CorruptionError, as Recheck.twice.
    """
    run, engine = runner.run, runner.engine
    result, times = _gradients(runner, step, batches, check)
    if after_reduce is not None:
        after_reduce()
    norm = engine.norm()
    verdict = policy(StepNumbers(step=step, loss=result.loss, grad_norm=norm), run)
    if verdict.cause and not isfinite(result.loss + norm):
        verdict = replace(verdict, cause=f"{verdict.cause} {origin(runner, batches, result.loss)}".strip())
    if verdict.action in _ENDS:
        ending = _ENDS[verdict.action](verdict.cause, verdict.cure)
        ending.step = step
        raise ending
    rate = learning_rate(step, run.optimizer.lr, run.schedule)
    if verdict.action is Action.go_on:
        engine.clip(norm)
        (update or engine.update)(rate)
        runner.finish_step(result)
    ended = time.perf_counter()
    if check is not None:
        check.remember(step)
    return StepOutcome(
        result=result,
        grad_norm=norm,
        learning_rate=rate,
        verdict=verdict,
        forward_backward_seconds=times.scheduled - times.start,
        optimizer_seconds=times.reduced - times.scheduled + ended - times.end,
        check_seconds=times.start - times.begun + times.end - times.reduced,
    )


@dataclass(slots=True)
class _Times:
    """Of a step's gradients, by the clock; between `start` and `reduced` of the last pass alone."""

    begun: float
    start: float = 0.0
    scheduled: float = 0.0
    reduced: float = 0.0
    end: float = 0.0


def _gradients(runner: StepRunner, step: int, batches: list[Batch], check: Recheck | None) -> tuple[StepResult, _Times]:
    """Forward, backward and reduction: once, or as often as `check` has it. Collective."""
    times = _Times(begun=time.perf_counter())

    def one_pass() -> StepResult:
        times.start = time.perf_counter()
        result = runner.forward_backward(batches)
        times.scheduled = time.perf_counter()
        runner.engine.reduce()
        times.reduced = time.perf_counter()
        return result

    result = check.twice(step, one_pass, batches) if check is not None and check.is_due(step) else one_pass()
    times.end = time.perf_counter()
    return result, times

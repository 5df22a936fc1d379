"""StepSizes: how many samples each step of a run has. Whoever counts samples of steps counts them here.

training.batch_ramp, training.global_batch_size --> spans of steps of one size --> samples of N steps, and back
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf

from gpt4moe.config import MISSING
from gpt4moe.errors import ConfigError


@dataclass(kw_only=True, slots=True)
class BatchLevelConfig:
    """One level of training.batch_ramp."""

    global_batch_size: int = MISSING
    """Of the steps of this level."""
    until_samples: float = MISSING
    """The level ends with the step that brings the run to so many samples, counted from its beginning."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepSpan:
    """Consecutive steps of one size, up to where the next span begins."""

    first_step: int
    """Steps of the run before it."""
    first_sample: int
    """Samples of the run before it."""
    global_batch_size: int


class StepSizes:
    """The sizes of all steps of a run, however long it is.

    Args:
        ramp: levels that passed validate_ramp.
        global_batch_size: after the last level.
    """

    def __init__(self, ramp: Sequence[BatchLevelConfig], global_batch_size: int):
        self.spans: list[StepSpan] = []
        step = sample = 0
        for level in ramp:
            steps = max(0, _ceil_div(level.until_samples - sample, level.global_batch_size))
            self.spans.append(StepSpan(first_step=step, first_sample=sample, global_batch_size=level.global_batch_size))
            step, sample = step + steps, sample + steps * level.global_batch_size
        self.spans.append(StepSpan(first_step=step, first_sample=sample, global_batch_size=global_batch_size))

    def at_step(self, step: int) -> StepSpan:
        """The span of step number `step`, from 1."""
        return self.spans[bisect_right([span.first_step for span in self.spans], step - 1) - 1]

    def at_sample(self, sample: int) -> StepSpan:
        """The span of the step that follows so many samples."""
        return self.spans[bisect_right([span.first_sample for span in self.spans], sample) - 1]

    def within(self, steps: int) -> list[tuple[StepSpan, int]]:
        """The spans of the first `steps` steps, and how many of these each has."""
        ends = [span.first_step for span in self.spans[1:]] + [steps]
        counted = [(span, min(end, steps) - span.first_step) for span, end in zip(self.spans, ends, strict=True)]
        return [(span, count) for span, count in counted if count > 0]

    def samples(self, steps: int) -> int:
        """Samples of the first `steps` steps."""
        span = self.at_step(steps + 1)
        return span.first_sample + (steps - span.first_step) * span.global_batch_size

    def steps(self, samples: float) -> int:
        """Whole steps that so many samples are enough for, from the beginning of the run."""
        span = self.at_sample(int(samples))
        return span.first_step + int((samples - span.first_sample) // span.global_batch_size)


def validate_ramp(ramp: Sequence[BatchLevelConfig], global_batch_size: int, micro_batch_size: int) -> None:
    """Raises: ConfigError for sizes that do not rise to global_batch_size, and for a level without a step."""
    size = until = 0.0
    for number, level in enumerate(ramp):
        name = f"training.batch_ramp[{number}]"
        if not max(1, size + 1) <= level.global_batch_size < global_batch_size:
            raise ConfigError(
                f"{name}.global_batch_size={level.global_batch_size} is not between {size:g} and "
                f"training.global_batch_size={global_batch_size}.",
                "Let every level be larger than the one before and smaller than training.global_batch_size, which "
                "follows the last one.",
            )
        if level.global_batch_size % micro_batch_size:
            raise ConfigError(
                f"{name}.global_batch_size={level.global_batch_size} is no multiple of "
                f"training.micro_batch_size={micro_batch_size}.",
                f"Set it to {-(-level.global_batch_size // micro_batch_size) * micro_batch_size}, or a smaller "
                "training.micro_batch_size.",
            )
        if not until < level.until_samples < inf:
            raise ConfigError(
                f"{name}.until_samples={level.until_samples:g} does not follow {until:g}.",
                "Give levels in ascending order of until_samples, the first above 0.",
            )
        size, until = level.global_batch_size, level.until_samples
    spans = StepSizes(ramp, global_batch_size).spans
    for number, (span, following) in enumerate(pairwise(spans)):
        if span.first_step == following.first_step:
            raise ConfigError(
                f"training.batch_ramp[{number}] has no step: the level before ends with sample {span.first_sample}, "
                f"and its until_samples is {ramp[number].until_samples:g}.",
                f"Leave the level out, or set until_samples to {span.first_sample + span.global_batch_size} or more.",
            )


def _ceil_div(samples: float, size: int) -> int:
    return int(-(-samples // size))

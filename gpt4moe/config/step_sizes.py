"""StepSizes: how many samples each step of a run has, of how many tokens. Whoever counts either counts them here.

training.batch_ramp, global_batch_size   --+--> spans of steps of one size --> samples and tokens of N steps, and back
training.length_ramp, model.seq_length   --+
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
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


@dataclass(kw_only=True, slots=True)
class LengthLevelConfig:
    """One level of training.length_ramp."""

    seq_length: int = MISSING
    """Tokens of a sample in the steps of this level. Divides model.seq_length."""
    until_step: int = MISSING
    """The last step of the level, counted from the run's beginning."""
    global_batch_size: int | None = None
    """Of the steps of this level; null: training.global_batch_size."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepSpan:
    """Consecutive steps of one size, up to where the next span begins."""

    first_step: int
    """Steps of the run before it."""
    first_sample: int
    """Samples of the run before it."""
    first_token: int
    """Tokens of the run before it."""
    global_batch_size: int
    seq_length: int

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch_size * self.seq_length


class StepSizes:
    """The sizes of all steps of a run, however long it is.

    Args:
        ramp: levels that passed validate_ramp.
        global_batch_size: after the last level.
        seq_length: after the last level of `length_ramp`.
        length_ramp: levels that passed validate_lengths.
    """

    def __init__(
        self,
        ramp: Sequence[BatchLevelConfig],
        global_batch_size: int,
        seq_length: int,
        length_ramp: Sequence[LengthLevelConfig] = (),
    ):
        self.spans: list[StepSpan] = []
        step = sample = token = 0
        while True:
            level = next((one for one in ramp if sample < one.until_samples), None)
            length = next((one for one in length_ramp if step < one.until_step), None)
            size = level.global_batch_size if level else (length and length.global_batch_size) or global_batch_size
            span = StepSpan(
                first_step=step, first_sample=sample, first_token=token, global_batch_size=size,
                seq_length=length.seq_length if length else seq_length,
            )  # fmt: skip
            self.spans.append(span)
            ends = [step + _ceil_div(level.until_samples - sample, size)] if level else []
            ends += [length.until_step] if length else []
            if not ends:
                break
            steps = min(ends) - step
            step, sample, token = step + steps, sample + steps * size, token + steps * span.tokens_per_step

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

    def tokens(self, steps: int) -> int:
        """Tokens of the first `steps` steps."""
        span = self.at_step(steps + 1)
        return span.first_token + (steps - span.first_step) * span.tokens_per_step

    def steps(self, tokens: float) -> int:
        """Whole steps that so many tokens are enough for, from the beginning of the run."""
        span = self._at_token(tokens)
        return span.first_step + int((tokens - span.first_token) // span.tokens_per_step)

    def samples_until(self, tokens: float) -> int:
        """The first samples of the run that have so many tokens."""
        span = self._at_token(tokens)
        return span.first_sample + _ceil_div(tokens - span.first_token, span.seq_length)

    def tokens_until(self, samples: int) -> int:
        """Tokens of the first `samples` samples."""
        span = self.at_sample(samples)
        return span.first_token + (samples - span.first_sample) * span.seq_length

    def lengths(self) -> list[tuple[int, int]]:
        """(first sample, tokens of a sample) wherever samples of another length begin."""
        found: list[tuple[int, int]] = []
        for span in self.spans:
            if not found or found[-1][1] != span.seq_length:
                found.append((span.first_sample, span.seq_length))
        return found

    def _at_token(self, tokens: float) -> StepSpan:
        return self.spans[bisect_right([span.first_token for span in self.spans], tokens) - 1]


def validate_ramp(ramp: Sequence[BatchLevelConfig], following: tuple[str, int], micro_batch_size: int) -> None:
    """Args:
        following: the key of the size that follows the last level, and that size.
    Raises: ConfigError for sizes that do not rise to the one that follows, and for a level without a step.
    """
    key, global_batch_size = following
    size = until = 0.0
    for number, level in enumerate(ramp):
        name = f"training.batch_ramp[{number}]"
        if not max(1, size + 1) <= level.global_batch_size < global_batch_size:
            raise ConfigError(
                f"{name}.global_batch_size={level.global_batch_size} is not between {size:g} and "
                f"{key}={global_batch_size}.",
                f"Let every level be larger than the one before and smaller than {key}, which follows the last one.",
            )
        _require_micro_batches(name, level.global_batch_size, micro_batch_size)
        if not until < level.until_samples < inf:
            raise ConfigError(
                f"{name}.until_samples={level.until_samples:g} does not follow {until:g}.",
                "Give levels in ascending order of until_samples, the first above 0.",
            )
        size, until = level.global_batch_size, level.until_samples
    spans = StepSizes(ramp, global_batch_size, 1).spans
    taken = {span.global_batch_size for span in spans}
    for number, level in enumerate(ramp):
        if level.global_batch_size not in taken:
            before = next(span.first_sample for span in spans if span.global_batch_size > level.global_batch_size)
            raise ConfigError(
                f"training.batch_ramp[{number}] has no step: the level before ends with sample {before}, "
                f"and its until_samples is {level.until_samples:g}.",
                f"Leave the level out, or set until_samples to {before + level.global_batch_size} or more.",
            )


def validate_lengths(levels: Sequence[LengthLevelConfig], seq_length: int, micro_batch_size: int) -> None:
    """Args:
        seq_length: model.seq_length, which follows the last level.
    Raises: ConfigError for lengths that do not rise to it or do not divide it, and for a level without a step.
    """
    length = until = 0
    for number, level in enumerate(levels):
        name = f"training.length_ramp[{number}]"
        if not length < level.seq_length < seq_length:
            raise ConfigError(
                f"{name}.seq_length={level.seq_length} is not between {length} and model.seq_length={seq_length}.",
                "Let every level be longer than the one before and shorter than model.seq_length, which follows the "
                "last one.",
            )
        if seq_length % level.seq_length:
            fits = [one for one in range(length + 1, seq_length) if seq_length % one == 0]
            raise ConfigError(
                f"{name}.seq_length={level.seq_length} does not divide model.seq_length={seq_length}: shorter samples "
                "are the equal parts of a longest one.",
                f"Set it to {min(fits, key=lambda one: abs(one - level.seq_length))}, which does."
                if fits
                else "Leave the level out.",
            )
        if level.until_step <= until:
            raise ConfigError(
                f"{name}.until_step={level.until_step} does not follow {until}.",
                "Give levels in ascending order of until_step, the first 1 or more.",
            )
        if level.global_batch_size is not None:
            _require_micro_batches(name, level.global_batch_size, micro_batch_size)
        length, until = level.seq_length, level.until_step


def validate_both(
    ramp: Sequence[BatchLevelConfig], levels: Sequence[LengthLevelConfig], global_batch_size: int
) -> None:
    """Raises: ConfigError for a ramp that would go on in a level of the lengths that says its batch size itself."""
    if not ramp or all(level.global_batch_size is None for level in levels):
        return
    sizes = StepSizes(ramp, global_batch_size, 1, levels)
    end = next(span for span in sizes.spans if span.first_sample >= ramp[-1].until_samples)
    if end.first_step > levels[0].until_step:
        raise ConfigError(
            f"training.batch_ramp ends with step {end.first_step}, and training.length_ramp[0] before, with step "
            f"{levels[0].until_step}: levels that say their global_batch_size leave no room for a ramp.",
            f"Let it end by then (until_samples of its last level at most {sizes.samples(levels[0].until_step)}), or "
            "leave global_batch_size out of every level of training.length_ramp.",
        )


def _require_micro_batches(name: str, global_batch_size: int, micro_batch_size: int) -> None:
    if global_batch_size < 1 or global_batch_size % micro_batch_size:
        raise ConfigError(
            f"{name}.global_batch_size={global_batch_size} is no multiple of "
            f"training.micro_batch_size={micro_batch_size}.",
            f"Set it to {max(1, -(-global_batch_size // micro_batch_size)) * micro_batch_size}, or a smaller "
            "training.micro_batch_size.",
        )


def _ceil_div(count: float, size: int) -> int:
    return int(-(-count // size))

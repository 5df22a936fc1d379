"""Group resilience: when restarts end, and what a run does about a step whose numbers are wrong."""

from dataclasses import dataclass, field
from enum import Enum
from math import inf

from gpt4moe.config.cures import REFUSED
from gpt4moe.errors import ConfigError


class Remedy(str, Enum):
    """go_on: make the update, with a warning. skip: leave weights and moments as they are; the step's samples count as
    used. go_back: go on from an earlier checkpoint, without the samples that led here. stop: end the run with status 1;
    its last checkpoint is whole."""

    go_on = "go_on"
    skip = "skip"
    go_back = "go_back"
    stop = "stop"


@dataclass(kw_only=True, slots=True)
class ResilienceConfig:
    max_restarts: int = 100
    """Slurm may restart one job this many times. The next restart ends with status 2."""
    max_stuck_starts: int = 3
    """After this many launches in a row from the same step, the next restart by Slurm ends with status 2."""
    on_nonfinite: Remedy = field(default=Remedy.stop, metadata={REFUSED: (Remedy.go_on,)})
    """What is done when the loss or the gradient norm of a step is NaN or infinite: stop, skip or go_back."""
    on_spike: Remedy = Remedy.go_on
    """What is done when the loss or the gradient norm of a step is far above those before (spike_deviations)."""
    spike_window: int = 128
    """Steps before, without the skipped ones, that a step is compared with; from the 16th on."""
    spike_deviations: float = 8.0
    """A spike is further above the window's median than this many deviations: 1.4826 times the median distance from
    it, which is the standard deviation of a normal distribution, and at least 1% of the median loss or 10% of the
    median norm."""
    max_skips: int = 10
    """Steps skipped in a row. The next one that would be skipped stops the run."""
    go_back_checkpoints: int = 1
    """go_back goes on from the so-manieth newest healthy checkpoint; 1: the newest."""
    pass_over_steps: int = 100
    """go_back passes over the samples from that checkpoint to the step with the wrong numbers, and those of so many
    steps after it. PaLM passed over 200 to 500 batches (arXiv:2204.02311)."""
    max_go_backs: int = 5
    """Goings back in a row, none of which led to a checkpoint beyond the step that it began with. The next one stops
    the run."""
    suspect_steps: int = 10
    """A checkpoint of less than so many steps before one that was skipped, gone back from or stopped at is suspect."""
    hang_seconds: float = 300.0
    """A launch in which no rank has moved for so long hangs: every rank writes its stacks and ends with 86. At least
    three times the longest step; start-up, saving and evaluation may take four times as long. 0: nothing is a hang."""
    collective_timeout_minutes: float = 30.0
    """After which torch gives up on one collective. Above 4 x hang_seconds, so that a hang is told before."""
    recompute_every: int = 0
    """Every so many steps a step is computed twice and compared, which costs one step's time in so many; a flipped bit
    ends the run with status 1 and names its rank (training.recheck). 0: never."""

    @property
    def needs_numbers(self) -> bool:
        """Whether what is done about a step hangs on the numbers of those before, so that checkpoints keep them."""
        return self.on_spike is not Remedy.go_on or self.on_nonfinite is not Remedy.stop

    @property
    def meeting_seconds(self) -> float:
        """How long the ranks of a launch wait for those that have not come."""
        return max(LEAST_MEETING_SECONDS, HANG_PATIENCE * self.hang_seconds) if self.hang_seconds else inf

    @property
    def may_go_back(self) -> bool:
        return Remedy.go_back in (self.on_nonfinite, self.on_spike)

    def validate(self) -> None:
        for name in ("max_restarts", "max_stuck_starts"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"resilience.{name}={getattr(self, name)} would refuse the first restart.",
                    f"Set resilience.{name}=1 or more.",
                )
        if self.on_nonfinite is Remedy.go_on:
            raise ConfigError(
                "resilience.on_nonfinite=go_on would make NaN of every weight.",
                "Set resilience.on_nonfinite=skip, go_back or stop.",
            )
        if self.spike_window < MIN_STEPS:
            raise ConfigError(
                f"resilience.spike_window={self.spike_window} is below the {MIN_STEPS} steps that a deviation needs.",
                f"Set {MIN_STEPS} or more; 128 is usual.",
            )
        if not 0 < self.spike_deviations < inf:
            raise ConfigError(
                f"resilience.spike_deviations={self.spike_deviations:g} is no distance.",
                "Set a number above 0, 6 to 10 say.",
            )
        if self.recompute_every < 0:
            raise ConfigError(
                f"resilience.recompute_every={self.recompute_every} is below 0.",
                "Set 100, say: every 100th step is computed twice. 0: none.",
            )
        if self.max_skips < 1:
            raise ConfigError(
                f"resilience.max_skips={self.max_skips} is below 1.",
                "Set 1 or more; to skip nothing, set on_nonfinite=stop and on_spike=go_on or stop.",
            )
        for name, least in (("go_back_checkpoints", 1), ("pass_over_steps", 0), ("max_go_backs", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"resilience.{name}={getattr(self, name)} is below {least}.", f"Set {least} or more.")
        if self.suspect_steps < 0:
            raise ConfigError(
                f"resilience.suspect_steps={self.suspect_steps} is below 0.",
                "Set 0, and no checkpoint is suspect for what came after it, or more.",
            )
        self._validate_hangs()

    def _validate_hangs(self) -> None:
        if not (self.hang_seconds == 0 or 1 <= self.hang_seconds < inf):
            raise ConfigError(
                f"resilience.hang_seconds={self.hang_seconds:g} is no time to wait.",
                "Set seconds, 1 or more; 300 is usual. 0 looks for no hang.",
            )
        if not 0 < self.collective_timeout_minutes <= MAX_TIMEOUT_MINUTES:
            raise ConfigError(
                f"resilience.collective_timeout_minutes={self.collective_timeout_minutes:g} is no time to wait.",
                f"Set minutes, above 0 and at most {MAX_TIMEOUT_MINUTES}; 30 is usual.",
            )
        needed = HANG_PATIENCE * self.hang_seconds / 60
        if self.collective_timeout_minutes <= needed:
            raise ConfigError(
                f"resilience.collective_timeout_minutes={self.collective_timeout_minutes:g} ends a collective before "
                f"resilience.hang_seconds={self.hang_seconds:g} has seen a hang: a save may take {HANG_PATIENCE} times "
                "that.",
                f"Set collective_timeout_minutes above {needed:g}, or hang_seconds lower.",
            )


MIN_STEPS = 16
"""A median distance of fewer steps says little."""
HANG_PATIENCE = 4
"""How many times hang_seconds a start-up, a save or an evaluation may stand still."""
LEAST_MEETING_SECONDS = 60.0
"""Ranks that make the same imports side by side may begin so far apart."""
MAX_TIMEOUT_MINUTES = 7 * 24 * 60
"""A week."""

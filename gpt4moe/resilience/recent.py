"""Recent: losses and gradient norms of the last steps that were taken, and whether a new step is far above them.

The rule is robust: of a window of steps it takes the median and the median distance from it, so that one spike among
them does not hide the next. It looks up only: a loss that falls fast is welcome.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

from gpt4moe.config.resilience import MIN_STEPS, ResilienceConfig

_OF_NORMAL = 1.4826
"""Standard deviation of a normal distribution over its median distance from the median."""
_LEAST_OF_LOSS = 0.01
_LEAST_OF_NORM = 0.1
_EARLY_FACTOR = 2.0
"""Before there is a window: a loss this many times the highest before is a spike. It begins near log(vocabulary)."""


@dataclass(kw_only=True, slots=True)
class Recent:
    """A part of a run's state, and of its checkpoints: a restart must judge as the run would have."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    skipped_in_a_row: int = 0
    setting: str = ""
    """What the steps have in common (length of samples, phase of the data): another one begins a new window."""

    def begin(self, setting: str) -> None:
        """A step comes. Where its setting is another than that of the steps before, nothing can be compared."""
        if setting != self.setting:
            self.losses, self.grad_norms, self.setting = [], [], setting

    def take(self, loss: float, grad_norm: float, window: int) -> None:
        """A step was taken."""
        self.losses = [*self.losses, loss][-window:]
        self.grad_norms = [*self.grad_norms, grad_norm][-window:]
        self.skipped_in_a_row = 0

    def spike(self, loss: float, grad_norm: float, limits: ResilienceConfig) -> str | None:
        """What of a step's finite numbers is far above those before, in words with the numbers; None: neither."""
        if len(self.losses) < MIN_STEPS:
            highest = max(self.losses, default=loss)
            return (
                f"loss {loss:.4g} is {loss / highest:.1f} times the highest before"
                if loss > _EARLY_FACTOR * highest > 0
                else None
            )
        for name, value, before, least in (
            ("loss", loss, self.losses, _LEAST_OF_LOSS), ("gradient norm", grad_norm, self.grad_norms, _LEAST_OF_NORM),
        ):  # fmt: skip
            middle, deviation = centre(before, least)
            if value > middle + limits.spike_deviations * deviation:
                return (
                    f"{name} {value:.4g} is {(value - middle) / deviation:.1f} deviations of {deviation:.2g} above the "
                    f"median {middle:.4g} of {len(before)} steps"
                )
        return None


def centre(values: Sequence[float], least: float) -> tuple[float, float]:
    """Median, and a deviation from it: 1.4826 median distances, at least `least` times the median, never 0."""
    middle = median(values)
    spread = _OF_NORMAL * median(abs(value - middle) for value in values)
    return middle, max(spread, least * abs(middle), 1e-12)

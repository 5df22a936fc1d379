"""When a job that starts itself again must stop doing so."""

from dataclasses import dataclass

from gpt4moe.errors import ConfigError

REPORT_SECONDS = 20.0
"""A run that was told to end gives its report no more than that: Slurm's grace is for the save, and for ending."""


@dataclass(kw_only=True, slots=True)
class ResilienceConfig:
    max_restarts: int = 100
    """Restarts by Slurm of one job; the next one is refused with status 2."""
    max_stuck_starts: int = 3
    """Starts in a row from the same step, the last ones restarts by Slurm, before the next is refused with status 2."""

    def validate(self) -> None:
        for name in ("max_restarts", "max_stuck_starts"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"resilience.{name}={getattr(self, name)} would refuse the first restart.",
                    f"Set resilience.{name}=1 or more.",
                )

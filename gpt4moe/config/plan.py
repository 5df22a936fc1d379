"""What `tools/plan.py` is asked: a run, and beside it, at the top level, the planner's own options."""

from dataclasses import dataclass
from enum import Enum

from gpt4moe.config.run import RunConfig
from gpt4moe.errors import ConfigError


class PlanOutput(str, Enum):
    """How the answer is written."""

    table = "table"
    json = "json"
    html = "html"


class PlanReport(str, Enum):
    """Reports that need no run of one's own."""

    leak = "leak"


@dataclass(kw_only=True, slots=True)
class PlanConfig(RunConfig):
    gpus: int | None = None
    """Devices; null: cluster.devices, or else as few as the layout allows."""
    output: PlanOutput = PlanOutput.table
    file: str = "plan.html"
    """Where output=html writes."""
    search: bool = False
    """Rank the legal layouts that fit the memory, instead of planning one. Without gpus and with budget_usd and days:
    also how many devices the money buys."""
    top: int = 10
    """Layouts that a search shows."""
    budget_usd: float | None = None
    """Money to spend; with search=true the tokens that it trains are given."""
    days: float | None = None
    """Time to spend it in."""
    report: PlanReport | None = None
    """leak: what was reported about GPT-4, claim by claim."""
    calibrate: str | None = None
    """A run folder: predicted against measured."""
    imbalance: float = 1.25
    """Rows at the fullest rank's experts over an even share; an assumption for routers that balance their load."""
    restart_minutes: float = 10.0
    """From an unexpected stop to the first step again; an assumption."""

    def validate(self) -> None:
        RunConfig.validate(self)
        for name in ("gpus", "top", "budget_usd", "days"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"{name}={value} is not above 0.", f"Set {name} above 0, or leave it out.")
        if self.report is not None and self.output is PlanOutput.html:
            raise ConfigError(
                f"report={self.report.value} with output=html: a report is a text or data, no page.",
                "Leave output out (markdown), or set output=json.",
            )
        if self.imbalance < 1 or self.restart_minutes < 0:
            raise ConfigError(
                f"imbalance={self.imbalance:g} or restart_minutes={self.restart_minutes:g} is too small.",
                "Set imbalance=1 or more and restart_minutes=0 or more.",
            )

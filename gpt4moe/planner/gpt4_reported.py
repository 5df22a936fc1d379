"""What the claims about GPT-4 are compared with: the reported runs as plans, and how a difference is told."""

from dataclasses import dataclass, replace

from gpt4moe.config.load import load_plan_config
from gpt4moe.config.parallel import Recompute
from gpt4moe.config.plan import PlanConfig
from gpt4moe.planner.estimate import Estimate, estimate
from gpt4moe.planner.serving import ServedModel, Serving, ServingLayout, most_sequences, serve, with_query_groups

DECODER = "THE DECODER, 2023-06-28/07-11"
SEMIANALYSIS = "SemiAnalysis, 2023-07-10"
INFERENCE = ServingLayout(tp=8, pp=16)
"""The reported layout of inference."""
CONTEXT = 8192
"""Tokens in the cache of each sequence that is served: the reported context."""
SEQUENCES = 64
"""Sequences in flight on the 128 devices under a light load: an assumption."""


@dataclass(frozen=True, slots=True)
class Claim:
    claim: str
    source: str
    reported: str
    ours: str
    verdict: str
    """The difference in %, or why the reported number does not follow."""
    assumptions: str


@dataclass(frozen=True, slots=True)
class ReportedRuns:
    """The plans that the claims are compared with."""

    gpt4: PlanConfig
    other: PlanConfig
    """8 x 220B."""
    davinci: PlanConfig
    vision: PlanConfig
    h100: PlanConfig
    """Whose cluster is H100s."""

    @classmethod
    def load(cls) -> "ReportedRuns":
        """As configs/ has them, whatever the command line says."""
        return cls(
            load_plan_config(["+experiment=gpt4"]),
            load_plan_config(["+experiment=gpt4_8x220b"]),
            load_plan_config(["model=davinci_175b", "cluster=a100_80g"]),
            load_plan_config(["+experiment=gpt4_vision"]),
            load_plan_config(["cluster=h100_80g"]),
        )

    def trained(self) -> Estimate:
        """As reported: the layout without recomputation and without failures, whatever its memory."""
        plan = replace(self.gpt4, parallel=replace(self.gpt4.parallel, recompute=Recompute.none, recompute_layers=None))
        return estimate(self.without_failures(plan))

    @staticmethod
    def without_failures(plan: PlanConfig) -> PlanConfig:
        return replace(plan, cluster=replace(plan.cluster, hours_between_failures=None))

    def on_h100(self) -> Estimate:
        """The run on 8,400 H100, the legal count next to the reported 8,192, without failures."""
        return estimate(self.without_failures(replace(self.gpt4, cluster=self.h100.cluster, gpus=8400)))

    def served(self, groups: int) -> Serving:
        return serve(self.with_groups(groups), INFERENCE, sequences=SEQUENCES, context=CONTEXT)

    def with_groups(self, groups: int) -> ServedModel:
        return ServedModel(model=with_query_groups(self.gpt4.model, groups), cluster=self.gpt4.cluster)

    def davinci_served(self) -> Serving:
        """On 8 devices, as full as its caches of 2,048 tokens allow."""
        layout = ServingLayout(tp=8, pp=1)
        davinci = ServedModel(model=self.davinci.model, cluster=self.davinci.cluster)
        sequences = most_sequences(davinci, layout, context=2048)
        return serve(davinci, layout, sequences=sequences, context=2048)


def difference(ours: float, reported: float) -> str:
    return f"{100 * (ours / reported - 1):+.1f}%"


def ranged(value: float, ours: Estimate, unit: str = "{:.0f}") -> str:
    """A time or a cost of a plan, with what it may turn out as in brackets. Args: unit: a format, of every number."""
    likely = ours.likely(value)
    return unit.format(value) + (f" ({unit.format(likely[0])} to {unit.format(likely[1])})" if likely else "")


def within(ours: float, low: float, high: float) -> str:
    """Whether a number is in the reported range, and how far outside it."""
    if low <= ours <= high:
        return "within"
    return f"does not follow: {difference(ours, low if ours < low else high)} outside"


def fits_device(needed: float, device: float) -> str:
    if needed > device:
        return f"does not follow: a device has {device / 1e9:.1f} GB"
    return f"follows: {(device - needed) / 1e9:.1f} GB are left"

"""Serving on paper: the deployment that is asked for, and the best layouts of its devices, as the load grows.

    PlanConfig.inference -> layouts that to-inference can cut and that fit -> the fullest load within max_token_ms
                         -> the three best by inference.objective -> curves: sequences in flight, prompts at once

Prompts and new tokens take turns on the same devices and nothing is lost between them: a request takes its share of
both throughputs. Separate devices for each (disaggregation) cost the same.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from gpt4moe.config.cluster import ClusterConfig
from gpt4moe.config.plan import InferenceObjective, InferencePlanConfig, PlanConfig, ServedPrecision
from gpt4moe.errors import ConfigError, LayoutError
from gpt4moe.planner.efficiency import MEMORY_SHARE, ErrorInterval, generation_timing, planning_profile
from gpt4moe.planner.prefill import Prefill, prefill
from gpt4moe.planner.serving import (
    ALL_REDUCE_SECONDS,
    ALL_TO_ALL_SECONDS,
    MEMORY_USED,
    ServedModel,
    Serving,
    ServingLayout,
    most_sequences,
    serve,
    usd_per_tokens,
)
from gpt4moe.planner.serving_error import Quantity, served_interval
from gpt4moe.planner.serving_layouts import asked_layout, layouts

SHOWN = 3
"""Layouts beside the one that is asked for."""
MOST_PROMPTS = 64
"""Prompts at once in each copy, at the end of the curve."""
MILLION = 1e6


@dataclass(frozen=True, kw_only=True, slots=True)
class Deployment:
    """One layout under its chosen load."""

    layout: ServingLayout
    ep: int
    """Ranks that divide the experts; 1 for a model without."""
    most: int
    """Sequences that fit in each copy."""
    decode: Serving
    prefill: Prefill
    """Of a prompt that comes alone."""
    output_usd: float | None
    """USD for a million new tokens; None, as below: the cluster has no price."""
    input_usd: float | None
    """USD for a million prompt tokens, prompt after prompt."""
    request_usd: float | None
    requests_per_second: float
    new_tokens: int
    """Of a request."""

    @property
    def in_flight(self) -> int:
        """Sequences on all devices."""
        return self.decode.sequences * self.layout.copies

    @property
    def token_with_prompts_seconds(self) -> float:
        """From a token to the next while prompts of other requests take their turns: sequences in flight over new
        tokens a second of the whole (Little's law)."""
        return self.in_flight / (self.requests_per_second * self.new_tokens)


@dataclass(frozen=True, kw_only=True, slots=True)
class InferencePlan:
    """The answer of `plan.py serve`, which is report=inference."""

    config: InferencePlanConfig
    served: ServedModel
    asked: Deployment
    best: list[Deployment]
    legal: int
    """Layouts that to-inference can cut, of these devices."""
    fit: int
    """Of them, those that fit and keep max_token_ms."""

    @property
    def assumptions(self) -> list[str]:
        """What the numbers rest on, each with its source."""
        config, served = self.config, self.served
        cluster, timing = served.cluster, generation_timing(served.cluster.generation)
        share = planning_profile(cluster.generation).matrix
        tokens = config.prompt_tokens + config.new_tokens
        found = [
            f"prompts: training's forward pass (planner/layer_time.py; {timing.constants}), in chunks of "
            f"{config.chunk_tokens:,} tokens that follow each other through the stages",
            f"new tokens: weights in use and cache are read once at {MEMORY_SHARE:.0%} of the memory bandwidth, or "
            f"products run at {share:.0%} of the peak, whichever takes longer; a cache holds the prompt and half of "
            "the new tokens; the sequences of a copy form pp groups that follow each other; max_token_ms is kept "
            "without prompts of other requests between, whose turns are in the time beside it",
            f"a sum over tp waits {1e6 * ALL_REDUCE_SECONDS:g} us and its bytes, a message between stages as long "
            "without bytes: an assumption; nothing of it is hidden",
            "experts: chosen with equal chances, so a group reads those that it meets; the busiest rank gets "
            f"{served.imbalance:g} times the mean of rows (imbalance)",
            f"copies that share experts: an all-to-all waits {1e6 * ALL_TO_ALL_SECONDS:g} us (an assumption) and its "
            "bytes: bf16, a row for each expert chosen, not hidden. DeepEP sends fp8, once to each node, and hides it",
            f"memory: {MEMORY_USED:.0%} for weights and whole caches of {tokens:,} tokens (vLLM's default)",
            f"price: {_price(cluster)}, all devices busy all the time; no reuse of common prompts, no speculative "
            "decoding",
        ]
        if tokens > served.model.seq_length:
            found.append(f"{tokens:,} tokens are more than the model was trained on (model.seq_length="
                         f"{served.model.seq_length:,})")  # fmt: skip
        return found

    @property
    def shown(self) -> dict[str, Deployment]:
        """Name -> deployment, the asked one first; a layout once."""
        named = {"asked": self.asked}
        return named | {f"best {at}": found for at, found in enumerate(self.best, start=1)}

    def interval(self, deployment: Deployment, quantity: Quantity) -> ErrorInterval | None:
        """How far off such a number was for published deployments; None: no row is known."""
        return served_interval(self.served, deployment.layout, quantity)

    def decode_curve(self, deployment: Deployment) -> list[Serving]:
        """From one sequence in each copy until the memory is full."""
        loads = {2**power for power in range(deployment.most.bit_length())} | {
            deployment.most,
            deployment.decode.sequences,
        }
        return [_decode(self.config, self.served, deployment.layout, load) for load in sorted(loads)]

    def prefill_curve(self, deployment: Deployment) -> list[Prefill]:
        """From one prompt in each copy to MOST_PROMPTS."""
        loads = (2**power for power in range(MOST_PROMPTS.bit_length()))
        return [_prefill(self.config, self.served, deployment.layout, load) for load in loads]


OBJECTIVES: dict[InferenceObjective, tuple[str, Callable[[Deployment], float]]] = {
    # Layouts of as many devices: what takes the least time costs the least, whatever an hour costs.
    InferenceObjective.output_usd: ("USD for a million new tokens", lambda d: 1 / d.decode.tokens_per_second),
    InferenceObjective.request_usd: ("USD for a request", lambda d: 1 / d.requests_per_second),
    InferenceObjective.first_token: ("seconds to the first token", lambda d: d.prefill.first_token_seconds),
}
"""Objective -> (in words, a number that is smallest where this is)."""


def plan_inference(plan: PlanConfig) -> InferencePlan:
    """The deployment asked for, and the best layouts on as many devices.

    Raises: LayoutError if it cannot be cut so or does not fit; ConfigError if the cluster has no fp8.
    """
    config, served = plan.inference, served_model(plan)
    layout = asked_layout(plan)
    asked = deployed(config, served, layout)
    if asked is None:
        raise LayoutError(*_too_small(plan, layout, served))
    candidates = list(layouts(plan, layout.devices))
    found = [asked if other == layout else deployed(config, served, other) for other in candidates]
    kept = [d for d in found if d is not None and d.decode.latency_seconds <= config.max_token_ms / 1000]
    best = sorted(kept, key=OBJECTIVES[config.objective][1])[:SHOWN]
    return InferencePlan(
        config=config, served=served, asked=asked, best=best, legal=len(candidates), fit=len(kept)
    )  # fmt: skip


def served_model(plan: PlanConfig) -> ServedModel:
    """Raises: ConfigError for fp8 on a cluster without it."""
    is_fp8 = plan.inference.precision is ServedPrecision.fp8
    if is_fp8 and plan.cluster.peak_flops_fp8 is None:
        raise ConfigError(
            f"inference.precision=fp8: cluster={plan.cluster.name} has no fp8 (cluster.peak_flops_fp8 is null).",
            "Set inference.precision=bf16, or another cluster: cluster=h100_80g.",
        )
    return ServedModel(model=plan.model, cluster=plan.cluster, is_fp8=is_fp8, imbalance=plan.imbalance)


def deployed(config: InferencePlanConfig, served: ServedModel, layout: ServingLayout) -> Deployment | None:
    """The layout under its fullest load within max_token_ms; one sequence a copy if none is. None: it does not fit."""
    most = most_sequences(served, layout, context=config.prompt_tokens + config.new_tokens)
    wanted = -(-config.sequences // layout.copies) if config.sequences else None
    if most < (wanted or 1):
        return None
    decode = _decode(config, served, layout, wanted) if wanted else _fullest(config, served, layout, most)
    alone = _prefill(config, served, layout, 1)
    devices, cluster = layout.devices, served.cluster
    request = config.prompt_tokens / alone.steady_tokens_per_second + config.new_tokens / decode.tokens_per_second
    return Deployment(
        layout=layout, ep=layout.ep if served.model.moe else 1, most=most, decode=decode, prefill=alone,
        output_usd=decode_usd(decode, cluster), input_usd=prefill_usd(alone, devices, cluster),
        request_usd=usd_per_tokens(1, devices, 1 / request, cluster), requests_per_second=1 / request,
        new_tokens=config.new_tokens,
    )  # fmt: skip


def _price(cluster: ClusterConfig) -> str:
    if cluster.usd_per_hour is None:
        return "not known: cluster.usd_per_hour=..."
    return f"${cluster.usd_per_hour:.2f} a device hour (configs/cluster)"


def decode_usd(decode: Serving, cluster: ClusterConfig) -> float | None:
    """USD for a million new tokens; None: the cluster has no price."""
    return usd_per_tokens(MILLION, decode.devices, decode.tokens_per_second, cluster)


def prefill_usd(prompts: Prefill, devices: int, cluster: ClusterConfig) -> float | None:
    """USD for a million prompt tokens, prompt after prompt."""
    return usd_per_tokens(MILLION, devices, prompts.steady_tokens_per_second, cluster)


def _fullest(config: InferencePlanConfig, served: ServedModel, layout: ServingLayout, most: int) -> Serving:
    """The most sequences whose token takes no longer than max_token_ms: latency grows with the load."""
    low, high = 1, most
    while low < high:
        middle = (low + high + 1) // 2
        if _decode(config, served, layout, middle).latency_seconds <= config.max_token_ms / 1000:
            low = middle
        else:
            high = middle - 1
    return _decode(config, served, layout, low)


def _decode(config: InferencePlanConfig, served: ServedModel, layout: ServingLayout, sequences: int) -> Serving:
    """On average a sequence has its prompt and half of its new tokens in the cache."""
    return serve(served, layout, sequences=sequences, context=config.prompt_tokens + config.new_tokens // 2)


def _prefill(config: InferencePlanConfig, served: ServedModel, layout: ServingLayout, prompts: int) -> Prefill:
    return prefill(
        served, layout, prompts=prompts, prompt_tokens=config.prompt_tokens, chunk_tokens=config.chunk_tokens
    )  # fmt: skip


def _too_small(plan: PlanConfig, layout: ServingLayout, served: ServedModel) -> tuple[str, str]:
    """(cause, cure) for a deployment whose devices cannot hold it. The cure was worked out."""
    config, context = plan.inference, plan.inference.prompt_tokens + plan.inference.new_tokens
    most = most_sequences(served, layout, context=context) * layout.copies
    cause = (
        f"inference.tp={layout.tp} x pp={layout.pp} on {layout.devices} x {plan.cluster.name} "
        f"({plan.cluster.memory_bytes / 1e9:.0f} GB) holds the weights and {most} sequences of {context} tokens; "
        f"{config.sequences or 1} are asked for."
    )
    if most:
        return cause, f"Set inference.sequences={most}, or leave it out."
    for gpus in (layout.devices * 2**power for power in range(7)):
        other = replace(config, sequences=None)
        fits = [d for d in (deployed(other, served, found) for found in layouts(plan, gpus)) if d is not None]
        if fits:
            best = min(fits, key=OBJECTIVES[config.objective][1]).layout
            return cause, f"Set inference.tp={best.tp} inference.pp={best.pp} inference.ep={best.ep} gpus={gpus}."
    return cause, "Take a cluster with more memory, or a shorter prompt."

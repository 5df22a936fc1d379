"""All legal layouts of a model on a number of devices, the fastest first that fit the memory.

    degrees x micro-batch x recomputation --legality (the trainer's)--> step_time --sort--> memory --> the best few

Memory is exact but slow, so it is asked best first, and only of layouts whose states and live activations can fit.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from gpt4moe.config.model import divisors
from gpt4moe.config.parallel import ParallelConfig, Recompute
from gpt4moe.config.plan import PlanConfig
from gpt4moe.config.training import TrainingConfig
from gpt4moe.errors import LayoutError
from gpt4moe.parallel.layout import Layout
from gpt4moe.parallel.legality import layout_problems, planned_parts, support_problems
from gpt4moe.parallel.schedule import warmup_forwards
from gpt4moe.planner.activations import MicroBatch, layer_activations
from gpt4moe.planner.cost import hourly_price
from gpt4moe.planner.estimate import Estimate, estimate, timed_work, world_of
from gpt4moe.planner.layer_time import LayerKind, Work, layer_kinds
from gpt4moe.planner.step_time import heaviest_stage, step_time

MOST_CHECKS = 40
"""Layouts whose memory is worked out exactly before the search gives up."""
MICRO_BATCHES = (1, 2, 4, 8)
RECOMPUTATIONS = (Recompute.none, Recompute.selective, Recompute.moe, Recompute.full)
SMALLEST_SHARE = 0.95
"""Of the memory, for the quick look: it leaves buffers and reserve out, so it never refuses what would fit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Search:
    """The best layouts, and how many there were."""

    found: list[Estimate]
    """Fastest first; each fits the memory."""
    legal: int
    """Layouts that the trainer would run."""
    fits_at_a_glance: int
    """Of those, how many the quick look at the memory let through."""
    gpus: int
    tokens: float | None
    """That the budget trains with the best layout; None without a budget."""


def search(plan: PlanConfig) -> Search:
    """The layouts of plan.model for plan.gpus (or what the budget buys) and the global batch size.

    Raises: LayoutError where none is legal or none fits; ConfigError where a price is missing.
    """
    gpus = plan.gpus or _affordable(plan) or world_of(plan)
    plan = replace(plan, gpus=gpus)
    kinds = layer_kinds(plan.model)
    legal = 0
    timed: list[tuple[float, int, PlanConfig]] = []
    sizes: dict[tuple[int, ...], tuple[float, float]] = {}  # of parameters: one answer for many candidates
    for candidate in candidates(plan, gpus):
        legal += 1
        work, cut = timed_work(candidate, kinds), candidate.parallel
        key = (cut.tp, cut.pp, cut.vpp, cut.ep)
        if key not in sizes:
            sizes[key] = heaviest_stage(work)
        if _can_fit(candidate, work, gpus, sizes[key]):
            timed.append((step_time(work, candidate.training, gpus).seconds, len(timed), candidate))
    if not legal:
        raise LayoutError(
            f"No layout of {plan.model.name} on {gpus} devices is legal with training.global_batch_size="
            f"{plan.training.global_batch_size}.",
            f"Choose gpus that divide by 8 and a batch that divides by them, for example training.global_batch_size="
            f"{gpus}.",
        )
    timed.sort(key=lambda entry: entry[:2])
    found: list[Estimate] = []
    for _, _, candidate in timed[:MOST_CHECKS]:
        result = estimate(candidate)
        if result.headroom_bytes >= 0:
            found.append(result)
        if len(found) == plan.top:
            break
    if not found:
        raise LayoutError(
            f"None of {legal} legal layouts of {plan.model.name} on {gpus} x {plan.cluster.name} fits "
            f"{plan.cluster.memory_bytes / 1e9:.0f} GB ({min(len(timed), MOST_CHECKS)} were worked out in full).",
            f"Take more devices (gpus={2 * gpus}) or ones with more memory (cluster=h200_141g, cluster=gb300).",
        )
    return Search(found=found, legal=legal, fits_at_a_glance=len(timed), gpus=gpus, tokens=_tokens(plan, found[0]))


def candidates(plan: PlanConfig, gpus: int) -> Iterator[PlanConfig]:
    """Every legal layout, micro-batch and recomputation, in a fixed order."""
    model, domain = plan.model, plan.cluster.devices_per_nvlink_domain
    experts = divisors(model.moe.num_experts) if model.moe else [1]
    is_planned = bool(planned_parts(model))  # the trainer refuses the model itself: weigh its layouts all the same
    batch = plan.training.global_batch_size
    for tp in (d for d in divisors(model.num_attention_heads) if d <= domain and gpus % d == 0):
        for pp in (d for d in divisors(gpus // tp) if d <= model.num_layers):
            for cp in (d for d in (1, 2, 4, 8, 16) if gpus % (tp * pp * d) == 0):
                dp = gpus // (tp * pp * cp)
                if batch % dp or (cp > 1 and model.seq_length // cp < 1024):
                    continue  # the batch does not divide; or a rank's part of a sequence would be tiny
                for vpp in _interleavings(model.num_layers, pp):
                    for ep in (d for d in experts if gpus // pp % d == 0):
                        yield from _variants(
                            plan, gpus, ParallelConfig(tp=tp, pp=pp, cp=cp, vpp=vpp, ep=ep), dp, is_planned
                        )


def _variants(plan: PlanConfig, gpus: int, parallel: ParallelConfig, dp: int, is_planned: bool) -> Iterator[PlanConfig]:
    for size in MICRO_BATCHES:
        training = replace(plan.training, micro_batch_size=size)
        if plan.training.global_batch_size % (dp * size) or not _is_legal(plan, parallel, training, gpus, is_planned):
            continue
        for recompute in RECOMPUTATIONS:
            if recompute is not Recompute.moe or plan.model.moe is not None:
                yield replace(plan, parallel=replace(parallel, recompute=recompute), training=training)


def _is_legal(
    plan: PlanConfig, parallel: ParallelConfig, training: TrainingConfig, gpus: int, is_planned: bool
) -> bool:
    if layout_problems(plan.model, parallel, training, gpus):
        return False
    return is_planned or not support_problems(plan.model, parallel)


def _interleavings(num_layers: int, pp: int) -> list[int]:
    """1, and virtual stages that all get as many layers; at most four of them: more are seldom apart."""
    even = [vpp for vpp in divisors(num_layers // pp) if vpp > 1] if pp > 1 and num_layers % pp == 0 else []
    return [1, *even[:3]]


def _can_fit(plan: PlanConfig, work: Work, gpus: int, parameters: tuple[float, float]) -> bool:
    """States and live activations of the first stage, without padding, buffers and reserve.

    Args: parameters: dense and expert ones of a rank of the heaviest stage.
    """
    layout = Layout.from_config(work.parallel, gpus)
    dense, expert = parameters
    owned = 12 * (dense / (layout.dp * layout.cp) + expert / layout.expert_dp)
    states = (work.value_bytes + 4) * (dense + expert) + owned
    limit = plan.cluster.memory_bytes * SMALLEST_SHARE
    return states < limit and states + _live_bytes(plan, work, layout) < limit


def _live_bytes(plan: PlanConfig, work: Work, layout: Layout) -> float:
    micro = MicroBatch.of(plan, layout, plan.imbalance)
    micro_batches = plan.training.global_batch_size // (plan.training.micro_batch_size * layout.dp)
    live = 1 + warmup_forwards(0, pp=layout.pp, vpp=layout.vpp, micro_batches=micro_batches)
    first: dict[int, tuple[int, LayerKind]] = {}
    for layer, kind in enumerate(work.kinds):
        first.setdefault(id(kind), (layer, kind))
    per_layer = [sum(layer_activations(micro, layer, plan.parallel.recompute).values()) for layer, _ in first.values()]
    return live * min(per_layer) * (len(work.kinds) // (layout.pp * layout.vpp))


def _affordable(plan: PlanConfig) -> int | None:
    """Devices that the budget rents for the days, in whole nodes of 8; None without both."""
    if plan.budget_usd is None or plan.days is None:
        return None
    gpus = int(plan.budget_usd / (plan.days * 24 * hourly_price(plan.cluster)) / 8) * 8
    if gpus < 8:
        raise LayoutError(
            f"budget_usd={plan.budget_usd:g} rents {gpus} x {plan.cluster.name} for {plan.days:g} days.",
            "Raise budget_usd, or take fewer days.",
        )
    return gpus


def _tokens(plan: PlanConfig, best: Estimate) -> float | None:
    """Tokens that money and days allow with the best layout."""
    if plan.budget_usd is None and plan.days is None:
        return None
    hours = [plan.days * 24] if plan.days is not None else []
    if plan.budget_usd is not None:
        hours.append(plan.budget_usd / (best.layout.world_size * hourly_price(plan.cluster)))
    return best.tokens * min(hours) * 3600 / best.run.seconds

"""All legal layouts of a model on a number of devices, the fastest first that fit the memory.

    degrees x micro-batch x recomputation --legality (the trainer's)--> may it fit (glance) --> step_time
    --fastest first--> memory in full --fits--> the best few
                                      --does not--> one more layer recomputed, back into the queue

Memory in full is slow, so it is asked best first, and only of layouts that a lower bound lets through.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from heapq import heapify, heappop, heappush
from math import ceil

from gpt4moe.config.model import divisors
from gpt4moe.config.optimizer import Dtype
from gpt4moe.config.parallel import ParallelConfig, Recompute
from gpt4moe.config.plan import PlanConfig
from gpt4moe.config.training import TrainingConfig
from gpt4moe.errors import LayoutError
from gpt4moe.parallel.layout import Layout
from gpt4moe.parallel.legality import layout_problems, planned_parts, support_problems
from gpt4moe.planner.cost import hourly_price
from gpt4moe.planner.estimate import STATE_BYTES, Estimate, estimate, timed_work, world_of
from gpt4moe.planner.glance import Glance, with_recomputed_layers
from gpt4moe.planner.layer_time import layer_kinds
from gpt4moe.planner.memory import KnownStates, memory_per_stage
from gpt4moe.planner.params import count_parameters
from gpt4moe.planner.step_time import step_time

MOST_MISSES = 300
"""Layouts that turn out not to fit before the search stops: a second of work."""
MOST_COUNTS = 4
"""Device counts that a budget's search compares."""
EXPERT_CUTS = (2, 4, 8)
"""Of etp, above 1."""
MICRO_BATCHES = (1, 2, 4, 8)
RECOMPUTATIONS = (Recompute.none, Recompute.selective, Recompute.moe, Recompute.full)


@dataclass(frozen=True, kw_only=True, slots=True)
class Search:
    """The best layouts, and how many there were."""

    found: list[Estimate]
    """Fastest first; each fits the memory."""
    legal: int
    """Layouts that the trainer would run, with each micro-batch and recomputation."""
    may_fit: int
    """Of those, how many a lower bound of their memory let through."""
    checked: int
    """Of those, how many were worked out in full, fastest first, with more layers recomputed counted again."""
    is_complete: bool
    """Whether every layout that may fit was looked at; if not, the others are slower than those found."""
    gpus: int
    tokens: float | None
    """That the budget trains with the best layout; None without a budget."""


def search(plan: PlanConfig) -> Search:
    """The layouts of plan.model for plan.gpus (or what the budget buys) and the global batch size.

    Raises: LayoutError where none is legal or none fits; ConfigError where a price is missing.
    """
    most = None if plan.gpus else _affordable(plan)
    gpus = plan.gpus or most or world_of(plan)
    gpus, timed = _well_spent(plan, most) if most else (gpus, _timed(plan, gpus))
    plan = replace(plan, gpus=gpus)
    if not timed.legal:
        raise LayoutError(
            f"No layout of {plan.model.name} on {gpus} devices is legal with training.global_batch_size="
            f"{plan.training.global_batch_size}.",
            f"Set training.global_batch_size={_legal_batch(plan)}, or choose gpus that it divides by.",
        )
    may_fit = len(timed.fastest)
    found, checked = fitting(plan, timed.fastest)
    if not found:
        more = _enough(plan, gpus)
        cure = f"Take gpus={more}, on which one fits" if more else "Take more devices and a larger batch"
        raise LayoutError(
            f"None of {timed.legal} legal layouts of {plan.model.name} on {gpus} x {plan.cluster.name} was found to "
            f"fit {plan.cluster.memory_bytes / 1e9:.0f} GB: a lower bound ruled all out but {may_fit}, of which "
            f"{checked}, the fastest, were worked out in full.",
            f"{cure}, or devices with more memory (cluster=h200_141g, or cluster=gb300 with cluster.usd_per_hour=6).",
        )
    return Search(
        found=found,
        legal=timed.legal,
        may_fit=may_fit,
        checked=checked,
        is_complete=not timed.fastest,
        gpus=gpus,
        tokens=_tokens(plan, found[0]),
    )


@dataclass(frozen=True, slots=True)
class _Timed:
    legal: int
    fastest: list[tuple[float, int, PlanConfig]]
    """Seconds of a step, a number, the plan: those that may fit, a heap."""


def fitting(plan: PlanConfig, fastest: list[tuple[float, int, PlanConfig]]) -> tuple[list[Estimate], int]:
    """(the first plan.top that fit, how many were worked out in full). What does not fit and recomputes a part of its
    layers comes back with more of them, in its turn."""
    known: dict[tuple[int, ...], KnownStates] = {}
    found: list[Estimate] = []
    checked = 0
    while fastest and len(found) < plan.top and checked - len(found) < MOST_MISSES:
        _, number, candidate = heappop(fastest)
        checked += 1
        cut = candidate.parallel
        states = known.setdefault((cut.tp, cut.pp, cut.vpp, cut.cp, cut.ep, cut.etp), {})
        layout = Layout.from_config(cut, plan.gpus or 0)
        memory = memory_per_stage(candidate, layout, imbalance=plan.imbalance, known=states)
        short = max(stage.total_bytes for stage in memory) - plan.cluster.memory_bytes
        if short <= 0:
            found.append(estimate(candidate))
        elif cut.recompute_layers is not None:
            more = replace(candidate, parallel=with_recomputed_layers(plan, cut, cut.recompute_layers + 1))
            seconds = step_time(timed_work(more), more.training, layout.world_size).seconds
            heappush(fastest, (seconds, number, more))
    return found, checked


def _timed(plan: PlanConfig, gpus: int) -> _Timed:
    """How many layouts are legal, and the seconds of those that may fit."""
    kinds, legal = layer_kinds(plan.model), 0
    plan = replace(plan, gpus=gpus)
    look, whole = Glance(plan, gpus), timed_work(plan, kinds)
    fastest: list[tuple[float, int, PlanConfig]] = []
    again = [r for r in RECOMPUTATIONS if r is not Recompute.moe or plan.model.moe is not None]
    for parallel in layouts(plan, gpus):
        trainings = list(_legal_trainings(plan, parallel, gpus))
        legal += len(trainings) * len(again)
        if not trainings:
            continue
        imbalance = plan.imbalance if parallel.ep > 1 else 1.0
        work = replace(whole, parallel=parallel, imbalance=imbalance)
        left = look.left(work)
        if left <= 0:
            continue
        for training in trainings:
            for recompute in again:
                cut = look.recomputed(parallel, training, recompute, left)
                if cut is not None:
                    work = replace(work, parallel=cut, micro_batch_size=training.micro_batch_size)
                    seconds = step_time(work, training, gpus, heaviest=look.parameters(work)).seconds
                    fastest.append((seconds, len(fastest), replace(plan, parallel=cut, training=training)))
    heapify(fastest)
    return _Timed(legal, fastest)


def layouts(plan: PlanConfig, gpus: int) -> Iterator[ParallelConfig]:
    """Every layout worth asking the trainer about, in a fixed order."""
    model, domain = plan.model, plan.cluster.devices_per_nvlink_domain
    experts = divisors(model.moe.num_experts) if model.moe else [1]
    batch = plan.training.global_batch_size
    for tp in (d for d in divisors(model.num_attention_heads) if d <= domain and gpus % d == 0):
        for pp in (d for d in divisors(gpus // tp) if d <= model.num_layers):
            for cp in (d for d in (1, 2, 4, 8, 16) if gpus % (tp * pp * d) == 0):
                if batch % (gpus // (tp * pp * cp)) or (cp > 1 and model.seq_length // cp < 1024):
                    continue  # the batch does not divide; or a rank's part of a sequence would be tiny
                for vpp in _interleavings(model.num_layers, pp):
                    for ep, etp in _expert_cuts(experts, gpus // pp):
                        yield ParallelConfig(tp=tp, pp=pp, cp=cp, vpp=vpp, ep=ep, etp=etp)


def _expert_cuts(experts: list[int], ranks: int) -> Iterator[tuple[int, int]]:
    """ep and etp over the ranks of a stage. Experts themselves are cut (etp 2 to 8) only where ep is as large as it
    goes: on the same ranks, more ep sends each row once, more etp to all that share an expert."""
    fits = [ep for ep in experts if ranks % ep == 0]
    yield from ((ep, 1) for ep in fits)
    if experts[-1] > 1:
        yield from ((fits[-1], etp) for etp in EXPERT_CUTS if ranks % (fits[-1] * etp) == 0)


def _legal_trainings(plan: PlanConfig, parallel: ParallelConfig, gpus: int) -> Iterator[TrainingConfig]:
    """Micro-batches that the trainer would run the layout with."""
    dp = gpus // (parallel.tp * parallel.pp * parallel.cp)
    is_planned = bool(planned_parts(plan.model))  # the trainer refuses the model itself: weigh its layouts all the same
    for size in MICRO_BATCHES:
        if plan.training.global_batch_size % (dp * size) == 0:
            training = replace(plan.training, micro_batch_size=size)
            if not layout_problems(plan.model, parallel, training, gpus) and (
                is_planned or not support_problems(plan.model, parallel)
            ):
                yield training


def _interleavings(num_layers: int, pp: int) -> list[int]:
    """1, and virtual stages that all get as many layers; at most four of them: more are seldom apart."""
    even = [vpp for vpp in divisors(num_layers // pp) if vpp > 1] if pp > 1 and num_layers % pp == 0 else []
    return [1, *even[:3]]


def _well_spent(plan: PlanConfig, most: int) -> tuple[int, _Timed]:
    """The device count with the fastest step, and what _timed says of it: most large counts have awkward divisors, so
    it is seldom the most that the budget rents. Looks at the first few with a layout that may fit, up to a tenth less.
    """
    first, seen = None, []
    for gpus in range(most, max(8, int(0.9 * most)) - 1, -8):
        timed = _timed(plan, gpus)
        first = first or (gpus, timed)
        if timed.fastest:
            seen.append((gpus, timed))
        if len(seen) == MOST_COUNTS:
            break
    assert first is not None
    return min(seen, key=lambda one: one[1].fastest[0][0]) if seen else first


def _legal_batch(plan: PlanConfig) -> int:
    """The nearest global batch size above that divides by the devices: legal at least with dp alone."""
    gpus = plan.gpus or 1
    return gpus * ceil(plan.training.global_batch_size / gpus)


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


def _enough(plan: PlanConfig, gpus: int) -> int | None:
    """A multiple of `gpus` on which a layout fits: from the fewest that hold all states, each once, doubled up to
    three times; None: none of them has one."""
    item = 2 if plan.precision.dtype is Dtype.bf16 else 4
    owned = 0 if plan.engine.offload_optimizer else STATE_BYTES
    needed = count_parameters(plan.model).total * (item + 4 + owned) / plan.cluster.memory_bytes
    first = gpus * max(2, ceil(needed / gpus))
    for more in (first, 2 * first, 4 * first, 8 * first):
        if fitting(replace(plan, gpus=more, top=1), _timed(plan, more).fastest)[0]:
            return more
    return None


def _tokens(plan: PlanConfig, best: Estimate) -> float | None:
    """Tokens that money and days allow with the best layout."""
    if plan.budget_usd is None and plan.days is None:
        return None
    hours = [plan.days * 24] if plan.days is not None else []
    if plan.budget_usd is not None:
        hours.append(plan.budget_usd / (best.layout.world_size * hourly_price(plan.cluster)))
    return best.tokens * min(hours) * 3600 / best.run.seconds

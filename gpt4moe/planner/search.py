"""All legal layouts of a model on a number of devices, the fastest first that fit the memory.

    degrees x micro-batch x recomputation --legality (the trainer's)--> step_time --sort--> memory --> the best few

Memory is exact but slow, so it is asked best first, and only of layouts whose states and live activations can fit.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from math import ceil
from typing import Any

from gpt4moe.config.model import divisors
from gpt4moe.config.optimizer import Dtype
from gpt4moe.config.parallel import ParallelConfig, Recompute
from gpt4moe.config.plan import PlanConfig
from gpt4moe.config.training import TrainingConfig
from gpt4moe.errors import LayoutError
from gpt4moe.parallel.layout import Layout
from gpt4moe.parallel.legality import layout_problems, planned_parts, support_problems
from gpt4moe.parallel.schedule import warmup_forwards
from gpt4moe.planner.activations import MicroBatch, layer_activations
from gpt4moe.planner.cost import hourly_price
from gpt4moe.planner.estimate import STATE_BYTES, Estimate, estimate, timed_work, world_of
from gpt4moe.planner.layer_time import LayerKind, Work, layer_kinds
from gpt4moe.planner.memory import CONTEXT_BYTES, FRAGMENTATION
from gpt4moe.planner.params import count_parameters
from gpt4moe.planner.step_time import heaviest_stage, step_time

MOST_CHECKS = 40
"""Layouts whose memory is worked out exactly before the search gives up."""
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
    fits_at_a_glance: int
    """Of those, how many the quick look at the memory let through."""
    gpus: int
    tokens: float | None
    """That the budget trains with the best layout; None without a budget."""


def search(plan: PlanConfig) -> Search:
    """The layouts of plan.model for plan.gpus (or what the budget buys) and the global batch size.

    Raises: LayoutError where none is legal or none fits; ConfigError where a price is missing.
    """
    most = None if plan.gpus else _affordable(plan)
    gpus = plan.gpus or most or world_of(plan)
    gpus, legal, timed = _well_spent(plan, most) if most else (gpus, *_timed(plan, gpus))
    plan = replace(plan, gpus=gpus)
    if not legal:
        raise LayoutError(
            f"No layout of {plan.model.name} on {gpus} devices is legal with training.global_batch_size="
            f"{plan.training.global_batch_size}.",
            f"Choose gpus that divide by 8 and a batch that divides by them, for example training.global_batch_size="
            f"{gpus}.",
        )
    found: list[Estimate] = []
    for _, _, candidate in timed[:MOST_CHECKS]:
        result = estimate(replace(candidate, gpus=gpus))
        if result.headroom_bytes >= 0:
            found.append(result)
        if len(found) == plan.top:
            break
    if not found:
        raise LayoutError(
            f"None of {legal} legal layouts of {plan.model.name} on {gpus} x {plan.cluster.name} fits "
            f"{plan.cluster.memory_bytes / 1e9:.0f} GB ({min(len(timed), MOST_CHECKS)} were worked out in full).",
            f"Take more devices (weights and gradients alone need gpus={_fewest(plan, gpus)} of these) or ones with "
            "more memory (cluster=h200_141g, cluster=gb300).",
        )
    return Search(found=found, legal=legal, fits_at_a_glance=len(timed), gpus=gpus, tokens=_tokens(plan, found[0]))


_Timed = list[tuple[float, int, PlanConfig]]


def _timed(plan: PlanConfig, gpus: int) -> tuple[int, _Timed]:
    """(how many are legal; those that can fit as seconds of a step, a number, the plan: the fastest first)"""
    kinds, legal = layer_kinds(plan.model), 0
    reserve = 0 if plan.cluster.name == "cpu" else CONTEXT_BYTES
    owned = 0 if plan.engine.offload_optimizer else STATE_BYTES
    look = _QuickLook(plan.cluster.memory_bytes - reserve, gpus, owned)
    timed: _Timed = []
    again = [r for r in RECOMPUTATIONS if r is not Recompute.moe or plan.model.moe is not None]
    for parallel in layouts(plan, gpus):
        trainings = list(_legal_trainings(plan, parallel, gpus))
        legal += len(trainings) * len(again)
        if not trainings:
            continue
        work = timed_work(replace(plan, parallel=parallel), kinds)
        if not look.states_fit(work):
            continue
        for training in trainings:
            for recompute in again:
                candidate = replace(plan, parallel=replace(parallel, recompute=recompute), training=training)
                if look.activations_fit(candidate, kinds):
                    work = timed_work(candidate, kinds)
                    step = step_time(work, training, gpus, heaviest=look.parameters(work))
                    timed.append((step.seconds, len(timed), candidate))
    return legal, sorted(timed, key=lambda entry: entry[:2])


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


@dataclass(frozen=True, slots=True)
class _QuickLook:
    """Whether states and live activations of the first stage fit, without padding and buffers: it refuses nothing that
    would fit. What many layouts share is worked out once."""

    limit: float
    """Bytes."""
    gpus: int
    owned_bytes: int
    """On the device, of an element that a rank's optimizer owns."""
    sizes: dict[tuple[int, ...], tuple[float, float]] = field(default_factory=dict)
    layers: dict[tuple[Any, ...], int] = field(default_factory=dict)

    def parameters(self, work: Work) -> tuple[float, float]:
        """Dense and expert ones of a rank of the heaviest stage."""
        cut = work.parallel
        key = (cut.tp, cut.pp, cut.vpp, cut.ep, cut.etp)
        if key not in self.sizes:
            self.sizes[key] = heaviest_stage(work)
        return self.sizes[key]

    def states(self, work: Work) -> float:
        dense, expert = self.parameters(work)
        layout = Layout.from_config(work.parallel, self.gpus)
        owned = self.owned_bytes * (dense / (layout.dp * layout.cp) + expert / layout.expert_dp)
        return (work.value_bytes + 4) * (dense + expert) + owned

    def states_fit(self, work: Work) -> bool:
        return self.states(work) < self.limit

    def activations_fit(self, plan: PlanConfig, kinds: list[LayerKind]) -> bool:
        cut, size = plan.parallel, plan.training.micro_batch_size
        layout = Layout.from_config(cut, self.gpus)
        key = (cut.tp, cut.cp, cut.ep, cut.etp, size, cut.recompute)
        if key not in self.layers:
            micro = MicroBatch.of(plan, layout, plan.imbalance)
            first = {id(kind): layer for layer, kind in reversed(list(enumerate(kinds)))}.values()
            self.layers[key] = min(sum(layer_activations(micro, layer, cut.recompute).values()) for layer in first)
        micro_batches = plan.training.global_batch_size // (size * layout.dp)
        live = 1 + warmup_forwards(0, pp=cut.pp, vpp=cut.vpp, micro_batches=micro_batches)
        held = live * self.layers[key] * (len(kinds) // (cut.pp * cut.vpp))
        return self.states(timed_work(plan, kinds)) + (1 + FRAGMENTATION) * held < self.limit


def _well_spent(plan: PlanConfig, most: int) -> tuple[int, int, _Timed]:
    """The device count with the fastest step, and what _timed says of it: most large counts have awkward divisors, so
    it is seldom the most that the budget rents. Looks at the first few with a layout that can fit, up to a tenth less.
    """
    seen: list[tuple[int, int, _Timed]] = []
    for gpus in range(most, max(8, int(0.9 * most)) - 1, -8):
        legal, timed = _timed(plan, gpus)
        if timed:
            seen.append((gpus, legal, timed))
        if len(seen) == MOST_COUNTS:
            break
    return min(seen, key=lambda one: one[2][0][0]) if seen else (most, *_timed(plan, most))


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


def _fewest(plan: PlanConfig, gpus: int) -> int:
    """The multiple of `gpus`, at least twice as many, that holds weights and fp32 gradients, each once."""
    item = 2 if plan.precision.dtype is Dtype.bf16 else 4
    needed = count_parameters(plan.model).total * (item + 4) / plan.cluster.memory_bytes
    return gpus * max(2, ceil(needed / gpus))


def _tokens(plan: PlanConfig, best: Estimate) -> float | None:
    """Tokens that money and days allow with the best layout."""
    if plan.budget_usd is None and plan.days is None:
        return None
    hours = [plan.days * 24] if plan.days is not None else []
    if plan.budget_usd is not None:
        hours.append(plan.budget_usd / (best.layout.world_size * hourly_price(plan.cluster)))
    return best.tokens * min(hours) * 3600 / best.run.seconds

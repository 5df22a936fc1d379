"""Search: the fastest layouts of a model that fit, on a number of devices or within a budget.

gpus, or money and days -> LayoutQueue (candidates) -> the fastest that fit -> Search
nothing found           -> search other devices, batches, clusters -> LayoutError; its cure was tried
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from math import ceil

from gpt4moe.architecture.count import count_parameters
from gpt4moe.config.beyond import Dispatch
from gpt4moe.config.load import known_clusters
from gpt4moe.config.model import divisors
from gpt4moe.config.optimizer import EngineConfig, EngineKind
from gpt4moe.config.plan import MOST_GPUS, PlanConfig
from gpt4moe.errors import ConfigError, LayoutError
from gpt4moe.planner.candidates import LayoutQueue
from gpt4moe.planner.estimate import Estimate, world_of
from gpt4moe.planner.run_time import hourly_price
from gpt4moe.planner.stacks import gradient_bytes
from gpt4moe.planner.states import VALUE_BYTES, owned_bytes

MOST_COUNTS = 4
"""A search within a budget compares so many of the largest device counts, and rounder ones."""
MOST_ABOVE = 1.25
"""And one rounder count above what the money rents for all days, up to so many times: for fewer days."""
MOST_TRIES = 6
"""If nothing was found: how many device counts, batches and clusters are tried for the cure."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Search:
    """The best layouts, and how many were examined."""

    found: list[Estimate]
    """Layouts that fit in memory, fastest first."""
    legal: int
    """Pairs of a layout and a micro-batch that the trainer would run (LayoutQueue.legal)."""
    may_fit: int
    """How many of them may fit, by the lower bound of memory."""
    checked: int
    """How often memory was computed in full. A layout counts once for each kind of recomputation tried."""
    is_complete: bool
    """Whether every layout that may fit was examined. If not, the others are slower than those found."""
    gpus: int
    tokens: float | None
    """Tokens that the budget pays for with the best layout; None without a budget."""
    days: float | None
    """Days that it takes to train them: fewer than those of the budget where the money is gone before."""

    @property
    def likely_tokens(self) -> tuple[float, float] | None:
        """What `tokens` may turn out as: a step of twice the time trains half of them. None: not known."""
        slower = self.found[0].likely(1.0)
        return None if slower is None or self.tokens is None else (self.tokens / slower[1], self.tokens / slower[0])


def search(plan: PlanConfig) -> Search:
    """The fastest layouts of plan.model for plan.gpus (or the devices that the budget rents) and the global batch size.

    Raises: LayoutError if none is legal or none fits; ConfigError if there is a budget and no price.
    """
    if plan.budget_usd is not None:
        hourly_price(plan.cluster)  # raises ConfigError before the search starts
    most = None if plan.gpus else _affordable(plan)
    queue, found, refused = _best_spent(plan, most) if most else _taken(plan, plan.gpus or world_of(plan))
    plan = queue.plan
    if not queue.legal:
        raise LayoutError(
            f"No layout of {plan.model.name} on {plan.gpus} devices is legal with training.global_batch_size="
            f"{plan.training.global_batch_size}{' and beyond.dispatch=overlapped' * _overlaps(plan)}.",
            _legal_cure(plan),
        )
    if not found and refused is not None:
        raise refused
    if not found:
        raise LayoutError(
            f"None of {queue.legal} legal layouts of {plan.model.name} on {plan.gpus} x {plan.cluster.name} was found "
            f"to fit {plan.cluster.memory_bytes / 1e9:.0f} GB: a lower bound ruled all out but {queue.may_fit}; "
            f"in full {queue.checked} memories were worked out, of the fastest first.",
            _room_cure(plan),
        )
    return Search(
        found=found,
        legal=queue.legal,
        may_fit=queue.may_fit,
        checked=queue.checked,
        is_complete=not queue.waiting,
        gpus=plan.gpus or 0,
        tokens=_tokens(plan, found[0]),
        days=_days(plan, found[0]),
    )


Taken = tuple[LayoutQueue, list[Estimate], ConfigError | None]


def _taken(plan: PlanConfig, gpus: int) -> Taken:
    """The layouts of so many devices: the queue as it is left, those found, and the error of one that fits."""
    queue = LayoutQueue.of(plan, gpus)
    return queue, *queue.take()


def _best_spent(plan: PlanConfig, most: int) -> Taken:
    """The device count that trains the most tokens for the money, and its layouts.

    The best count is seldom the largest, because few large numbers have many divisors. Compared are the first
    MOST_COUNTS counts down to 0.9 x `most` for which a layout fits, a rounder one above `most`, whose money is gone
    before the days are, then rounder and rounder ones, until even devices that never wait could not train as much.
    """
    tried = [_taken(plan, most)]
    for gpus in range(most - 8, max(8, int(0.9 * most)) - 1, -8):
        if sum(bool(found) for _, found, _ in tried) == MOST_COUNTS:
            break
        tried.append(_taken(plan, gpus))
    above = [gpus for gpus in _round_counts(int(MOST_ABOVE * most)) if gpus > most]
    tried += [_taken(plan, gpus) for gpus in above[-1:]]
    seen, fitting = {queue.bound.gpus for queue, _, _ in tried}, [one for one in tried if one[1]]
    if not fitting:
        return tried[0]
    for gpus in _round_counts(most):
        _, found, _ = max(fitting, key=_trained)
        # Devices that never wait: so many seconds of one device a sample. Layouts of other counts hardly need less.
        ideal = min(one.least_device_seconds for one, _, _ in fitting) * plan.training.global_batch_size / gpus
        run = found[0].run  # what saves and failures add counts too, because the choice is by tokens of the whole time
        if ideal >= found[0].step.seconds + run.checkpoint_seconds + run.failure_seconds:
            break
        if gpus not in seen:
            fitting += [one for one in [_taken(plan, gpus)] if one[1]]
    return max(fitting, key=_trained)


def _trained(taken: Taken) -> tuple[float, int]:
    """What is best when it is largest: tokens that the budget trains; of equals, the fewest devices."""
    queue, found, _ = taken
    return _tokens(queue.plan, found[0]) or 0.0, -queue.bound.gpus


def _round_counts(most: int) -> list[int]:
    """1, 3, 5 or 9 times a power of 2, whole nodes of 8, from `most` down."""
    return sorted({m << e for m in (1, 3, 5, 9) for e in range(3, 32) if m << e <= most}, reverse=True)


def _affordable(plan: PlanConfig) -> int | None:
    """Devices that budget_usd rents for `days`, in whole nodes of 8; None unless both are given."""
    if plan.budget_usd is None or plan.days is None:
        return None
    nodes = plan.budget_usd / (plan.days * 24 * hourly_price(plan.cluster)) / 8
    gpus = int(nodes * (1 + 1e-12)) * 8  # so that rounding takes no node from a budget that pays for it exactly
    if gpus > MOST_GPUS:
        raise ConfigError(
            f"budget_usd={plan.budget_usd:g} rents {gpus:.3g} x {plan.cluster.name} for {plan.days:g} days, more than "
            "any cluster has.",
            "Lower budget_usd, take more days, or set gpus.",
        )
    if gpus < 8:
        raise LayoutError(
            f"budget_usd={plan.budget_usd:g} rents no 8 x {plan.cluster.name} for {plan.days:g} days.",
            "Raise budget_usd, or take fewer days.",
        )
    return gpus


def _tokens(plan: PlanConfig, best: Estimate) -> float | None:
    """Tokens that the budget and the days allow with the best layout."""
    days = _days(plan, best)
    return None if days is None else best.tokens * days * 24 * 3600 / best.run.seconds


def _days(plan: PlanConfig, best: Estimate) -> float | None:
    """Days until the money or the days are gone, whichever is first; None: neither is given."""
    limits = [plan.days] if plan.days is not None else []
    if plan.budget_usd is not None:
        limits.append(plan.budget_usd / (best.layout.world_size * hourly_price(plan.cluster) * 24))
    return min(limits, default=None)


def _legal_cure(plan: PlanConfig) -> str:
    """Cure for a plan without a legal layout: fewer devices or another batch."""
    gpus, batch = plan.gpus or 1, plan.training.global_batch_size
    fewer = range(gpus - (gpus % 8 or 8), 0, -8)
    counts = next((f"gpus={n}" for n in islice(fewer, MOST_TRIES) if _finds(plan, n, batch)), None)
    near = sorted({n * max(1, round(batch / n)) for n in divisors(gpus)} - {batch}, key=lambda n: (abs(n - batch), n))
    batches = (f"training.global_batch_size={n}" for n in near[:MOST_TRIES] if _finds(plan, gpus, n))
    return _cure(
        [_plainer(plan), counts, next(batches, None)], "Choose gpus with many divisors, and a batch that they divide."
    )


def _room_cure(plan: PlanConfig) -> str:
    """Cure for a plan whose legal layouts need too much memory: more devices (and batch), or larger devices."""
    gpus, batch = plan.gpus or 1, plan.training.global_batch_size
    more = next((change for count, size, change in _more_devices(plan) if _finds(plan, count, size)), None)
    host = EngineConfig(kind=EngineKind.deepspeed, overlap_grad_reduce=False, offload_optimizer=True)
    slower = None if plan.engine.offload_optimizer else _found(replace(plan, engine=host), gpus, batch)
    offloaded = None if slower is None else "engine=deepspeed engine.offload_optimizer=true"
    roomier = sorted(
        (
            known
            for known in known_clusters()  # of the same maker: other software would have to run first
            if known.memory_bytes > plan.cluster.memory_bytes
            and known.generation.is_amd == plan.cluster.generation.is_amd
        ),
        key=lambda cluster: cluster.memory_bytes,
    )
    fits = (c.name for c in roomier[:MOST_TRIES] if _finds(replace(plan, cluster=c), gpus, batch))
    cluster = next((f"cluster={name}" for name in fits), None)
    cure = _cure(
        [_plainer(plan), more, offloaded, cluster], "Take more devices and a larger batch, or a smaller model."
    )
    if slower is None:
        return cure
    share = slower.step.parts["optimizer"] / slower.step.seconds
    return f"{cure} An offloaded optimizer's update is {share:.0%} of that step, and needs host memory."


def _overlaps(plan: PlanConfig) -> bool:
    return plan.beyond.dispatch is Dispatch.overlapped


def _plainer(plan: PlanConfig) -> str | None:
    """The cure of a dispatch that takes more layouts, if one of them fits."""
    tuned = replace(plan, beyond=replace(plan.beyond, dispatch=Dispatch.tuned))
    found = _overlaps(plan) and _finds(tuned, plan.gpus or 1, plan.training.global_batch_size)
    return "beyond.dispatch=tuned" if found else None


def _cure(changes: list[str | None], otherwise: str) -> str:
    found = [change for change in changes if change]
    return f"Set {', or '.join(found)}: a layout fits then." if found else otherwise


def _more_devices(plan: PlanConfig) -> Iterator[tuple[int, int, str]]:
    """(devices, batch, overrides) to try: the device count doubles each time.

    Each count is tried with the same batch and with a batch that grows as much. The first count is one whose devices
    together hold one copy of all states.
    """
    gpus, batch = plan.gpus or 1, plan.training.global_batch_size
    each = VALUE_BYTES[plan.precision.dtype] + gradient_bytes(plan) + owned_bytes(plan)
    needed = count_parameters(plan.model).total * each / plan.cluster.memory_bytes
    times = max(2, ceil(needed / gpus))
    for _ in range(4):
        yield gpus * times, batch, f"gpus={gpus * times}"
        yield gpus * times, batch * times, f"gpus={gpus * times} training.global_batch_size={batch * times}"
        times *= 2


def _finds(plan: PlanConfig, gpus: int, batch: int) -> bool:
    return _found(plan, gpus, batch) is not None


def _found(plan: PlanConfig, gpus: int, batch: int) -> Estimate | None:
    """The fastest layout that fits."""
    training = replace(plan.training, global_batch_size=batch, micro_batch_size=1)
    return next(iter(LayoutQueue.of(replace(plan, training=training, top=1), gpus).take()[0]), None)

"""The best layouts of a model on a number of devices, or on what a budget rents; and what to do where there is none.

gpus, or money and days -> Pool (candidates) -> the fastest that fit -> Search
"""

from dataclasses import dataclass

from gpt4moe.config.plan import PlanConfig
from gpt4moe.errors import LayoutError
from gpt4moe.planner.candidates import Pool
from gpt4moe.planner.cost import hourly_price
from gpt4moe.planner.estimate import Estimate, world_of
from gpt4moe.planner.search_cure import legal_cure, room_cure

MOST_COUNTS = 4
"""Device counts that a budget's search compares."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Search:
    """The best layouts, and how many there were."""

    found: list[Estimate]
    """Fastest first; each fits the memory."""
    legal: int
    """Layouts with a micro-batch that the trainer would run (candidates.Pool)."""
    may_fit: int
    """Of those, how many a lower bound of their memory let through."""
    checked: int
    """Memories worked out in full, fastest first, each recomputation of a layout counted."""
    is_complete: bool
    """Whether every layout that may fit was looked at; if not, the others are slower than those found."""
    gpus: int
    tokens: float | None
    """That the budget trains with the best layout; None without a budget."""


def search(plan: PlanConfig) -> Search:
    """The layouts of plan.model for plan.gpus (or what the budget buys) and the global batch size.

    Raises: LayoutError where none is legal or none fits; ConfigError where a price is missing.
    """
    hourly_price(plan.cluster)  # refused before anything is searched
    most = None if plan.gpus else _affordable(plan)
    pool = _well_spent(plan, most) if most else Pool.of(plan, plan.gpus or world_of(plan))
    plan = pool.plan
    if not pool.legal:
        raise LayoutError(
            f"No layout of {plan.model.name} on {plan.gpus} devices is legal with training.global_batch_size="
            f"{plan.training.global_batch_size}.",
            legal_cure(plan),
        )
    found, refused = pool.take()
    if not found and refused is not None:
        raise refused
    if not found:
        raise LayoutError(
            f"None of {pool.legal} legal layouts of {plan.model.name} on {plan.gpus} x {plan.cluster.name} was found "
            f"to fit {plan.cluster.memory_bytes / 1e9:.0f} GB: a lower bound ruled all out but {pool.may_fit}; in full "
            f"{pool.checked} memories were worked out, of the fastest first.",
            room_cure(plan),
        )
    return Search(
        found=found,
        legal=pool.legal,
        may_fit=pool.may_fit,
        checked=pool.checked,
        is_complete=not pool.waiting,
        gpus=plan.gpus or 0,
        tokens=_tokens(plan, found[0]),
    )


def _well_spent(plan: PlanConfig, most: int) -> Pool:
    """Of the device count with the fastest step: most large counts have awkward divisors, so it is seldom the most that
    the budget rents. Looks at the first few with a layout that may fit, up to a tenth less."""
    first, seen = None, []
    for gpus in range(most, max(8, int(0.9 * most)) - 1, -8):
        pool = Pool.of(plan, gpus)
        first = first or pool
        if pool.waiting:
            seen.append(pool)
        if len(seen) == MOST_COUNTS:
            break
    assert first is not None
    return min(seen, key=Pool.fastest) if seen else first


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

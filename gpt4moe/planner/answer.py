"""What a plan asks for, as data or as tables: an estimate or a search."""

from rich.table import Table

from gpt4moe.config.plan import PlanConfig
from gpt4moe.planner.estimate import estimate, to_json
from gpt4moe.planner.report import estimate_tables, search_tables
from gpt4moe.planner.search import search


def json_answer(plan: PlanConfig) -> dict[str, object]:
    """Plain data. Raises: Gpt4MoeError."""
    if not plan.search:
        return to_json(estimate(plan))
    result = search(plan)
    numbers = {"gpus": result.gpus, "legal": result.legal, "tokens": result.tokens}
    return {**numbers, "layouts": [_layout(to_json(found), found.plan) for found in result.found]}


def table_answer(plan: PlanConfig) -> list[Table | str]:
    """Tables and sentences. Raises: Gpt4MoeError."""
    return search_tables(search(plan)) if plan.search else estimate_tables(estimate(plan))


def _layout(numbers: dict[str, object], plan: PlanConfig) -> dict[str, object]:
    chosen = {"micro_batch_size": plan.training.micro_batch_size, "recompute": plan.parallel.recompute.value}
    return {**chosen, **numbers}

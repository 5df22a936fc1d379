"""What a plan asks for, as data or as tables: an estimate, a search, the leak report, a calibration."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace

from rich.table import Table

from gpt4moe.config.load import config_from_dict, load_plan_config
from gpt4moe.config.plan import PlanConfig
from gpt4moe.planner.calibrate import Compared, advice, calibrate
from gpt4moe.planner.estimate import estimate, to_json
from gpt4moe.planner.leak import Claim, Material, claims, leak_page
from gpt4moe.planner.report import estimate_tables, rows_table, search_tables
from gpt4moe.planner.search import search


def json_answer(plan: PlanConfig) -> dict[str, object]:
    """Plain data. Raises: Gpt4MoeError."""
    if plan.report is not None:
        return {"claims": [asdict(claim) for claim in leak_rows()]}
    if not plan.search:
        return to_json(estimate(plan))
    result = search(plan)
    looked = {"may_fit": result.may_fit, "checked": result.checked, "complete": result.is_complete}
    numbers = {"gpus": result.gpus, "legal": result.legal, **looked, "tokens": result.tokens}
    return {**numbers, "layouts": [_layout(to_json(found), found.plan) for found in result.found]}


def table_answer(plan: PlanConfig) -> list[Table | str]:
    """Tables and sentences. Raises: Gpt4MoeError."""
    return search_tables(search(plan)) if plan.search else estimate_tables(estimate(plan))


def leak_material() -> Material:
    """The plans of the report about GPT-4: its own runs, whatever else was asked."""
    return Material(
        load_plan_config(["+experiment=gpt4"]),
        load_plan_config(["+experiment=gpt4_8x220b"]),
        load_plan_config(["model=davinci_175b", "cluster=a100_80g"]),
    )


def leak_rows() -> list[Claim]:
    return claims(leak_material())


def leak_markdown() -> str:
    """docs/gpt4-numbers.md, whole."""
    return leak_page(leak_rows())


def calibration(
    plan: PlanConfig, resolved: dict[str, object], records: Sequence[Mapping[str, float]], ranks: int
) -> list[Compared]:
    """A finished or running run against its plan.

    Args:
        resolved: the run's resolved.yaml; its own keys count, the plan's only where they are the planner's.
        ranks: that it ran on.
    """
    run = config_from_dict(resolved)
    groups = {name: getattr(run, name) for name in type(run).__dataclass_fields__}
    return calibrate(replace(plan, **groups, gpus=ranks), records)


def calibration_table(rows: Sequence[Compared]) -> list[Table | str]:
    cells = []
    for row in rows:
        error = "unlike" if row.error is None else f"{100 * row.error:+.1f}"
        cells.append([row.name, f"{row.predicted:.4g}", f"{row.measured:.4g}", row.unit, error])
    head = ("what", "predicted", "measured", "unit", "error [%]")
    return [rows_table("Planned and measured", head, cells), *advice(rows)]


def calibration_json(rows: Sequence[Compared]) -> dict[str, object]:
    """A key a row, and the advice. error: a share; null where the two are unlike, and why."""
    compared = {row.name: {**asdict(row), "error": row.error} for row in rows}
    return {**compared, "advice": advice(rows)}


def _layout(numbers: dict[str, object], plan: PlanConfig) -> dict[str, object]:
    chosen = {
        "micro_batch_size": plan.training.micro_batch_size,
        "recompute": plan.parallel.recompute.value,
        "recompute_layers": plan.parallel.recompute_layers,
    }
    return {**chosen, **numbers}

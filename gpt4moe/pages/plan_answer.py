"""The answer of tools/plan.py in the form that was asked for: data, text, or tables."""

from pathlib import Path

import yaml
from rich.table import Table

from gpt4moe.config.plan import PlanConfig, PlanOutput
from gpt4moe.errors import DataError
from gpt4moe.pages.plan_page import write_plan_page
from gpt4moe.planner.answer import (
    calibration,
    calibration_json,
    calibration_table,
    json_answer,
    leak_markdown,
    table_answer,
)
from gpt4moe.planner.estimate import estimate
from gpt4moe.planner.search import search
from gpt4moe.runlog.metrics_log import METRICS_FILE, read_metrics


def answered(plan: PlanConfig) -> dict[str, object] | str | list[Table | str]:
    """A dictionary for JSON, a text, or tables. Raises: Gpt4MoeError."""
    if plan.calibrate is not None:
        return _calibrated(plan, Path(plan.calibrate))
    if plan.output is PlanOutput.json:
        return json_answer(plan)
    if plan.report is not None:
        return leak_markdown()
    if plan.output is PlanOutput.html:
        # Of a search, the page of the fastest layout.
        write_plan_page(plan.file, search(plan).found[0] if plan.search else estimate(plan))
        return f"{plan.file}\n"
    return table_answer(plan)


def _calibrated(plan: PlanConfig, folder: Path) -> dict[str, object] | list[Table | str]:
    """Of the run's last start: its config and the ranks it had."""
    starts = sorted((folder / "starts").glob("*.yaml"))
    if not starts or not (folder / METRICS_FILE).exists():
        raise DataError(
            f"calibrate={folder} is no run folder: it lacks starts/ or metrics.jsonl.",
            "Give the folder of a run, runs/<run.name>.",
        )
    try:
        last = yaml.safe_load(starts[-1].read_text())
        config, ranks = dict(last["config"]), int(last["ranks"])
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{starts[-1]} is damaged: it is no record of a start with its config and ranks.",
            "Calibrate another run, or start this one once more: each start writes its own record.",
        ) from error
    rows = calibration(plan, config, read_metrics(folder / METRICS_FILE), ranks)
    return calibration_json(rows) if plan.output is PlanOutput.json else calibration_table(rows)

"""loss.png and report.html from what lies in a run folder: made again at any time, by anyone, with no torch."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from gpt4moe.config.load import config_from_dict
from gpt4moe.planner.pipeline import PipelinePlan, run_pipeline
from gpt4moe.telemetry.balance import ExpertLoad
from gpt4moe.telemetry.metrics_log import read_metrics
from gpt4moe.telemetry.plots import plot_loss
from gpt4moe.telemetry.report import ReportData, RunStart, Sample, write_report

EXPERT_LOAD_FILE = "expert_load.json"
"""{"layers": [...], "tokens": [[...]], "first_step", "last_step"}: tokens per expert over the last steps of a start."""


def write_run_report(
    run_folder: Path, *, samples: Sequence[Sample] = (), entropies: dict[str, float] | None = None
) -> Path:
    """Writes both files and returns the report's path.

    Args:
        entropies: of the corpus in nats/token, "unigram" and "bigram", drawn as levels to compare the loss with.
    """
    entropies = entropies or {}
    records = read_metrics(run_folder / "metrics.jsonl")
    records_of_starts = [yaml.safe_load(path.read_text()) for path in sorted((run_folder / "starts").glob("*.yaml"))]
    starts = [_start(record) for record in records_of_starts]
    load = _expert_load(run_folder)
    steps = sorted((run_folder / "checkpoints").glob("step-*/manifest.json"))
    levels = {f"{name} entropy": value for name, value in entropies.items()}
    plot_loss(run_folder / "loss.png", records, title=run_folder.name, levels=levels)
    path = run_folder / "report.html"
    write_report(
        path,
        ReportData(
            run_name=run_folder.name,
            layout=starts[-1].layout if starts else "",
            records=records,
            resolved_config=(run_folder / "resolved.yaml").read_text(),
            checkpoint_path=str(steps[-1].parent) if steps else "",
            duration_seconds=sum(float(record["step_seconds"]) for record in records),
            unigram_entropy=entropies.get("unigram"),
            bigram_entropy=entropies.get("bigram"),
            expert_load=load,
            pipeline=_pipeline(records_of_starts[-1]) if starts else None,
            starts=starts,
            samples=samples,
        ),
    )
    return path


def _start(record: dict[str, Any]) -> RunStart:
    changed = [f"{key} {change['was']} -> {change['is']}" for key, change in record["changed"].items()]
    return RunStart(
        first_step=record["first_step"], when=record["time"], layout=record["layout"], note=", ".join(changed)
    )


def _pipeline(record: dict[str, Any]) -> PipelinePlan | None:
    """The schedule of a start; None without a pipeline."""
    if record["config"]["parallel"]["pp"] == 1:
        return None
    return run_pipeline(config_from_dict(record["config"]), record["ranks"])


def _expert_load(run_folder: Path) -> ExpertLoad | None:
    path = run_folder / EXPERT_LOAD_FILE
    if not path.exists():
        return None
    stored = json.loads(path.read_text())
    return ExpertLoad(layers=stored["layers"], tokens=stored["tokens"])

"""Makes loss.png and report.html from the files of a run folder, at any time and without torch."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpt4moe.config.load import config_from_dict
from gpt4moe.config.yaml_text import load_yaml
from gpt4moe.pages.plots import plot_loss
from gpt4moe.pages.report import ReportData, RunStart, Sample, write_report
from gpt4moe.pages.report_tables import WireCount
from gpt4moe.parallel.layout import Layout
from gpt4moe.planner.communication import bytes_of_all_ranks
from gpt4moe.planner.pipeline_plan import PipelinePlan, run_pipeline
from gpt4moe.runlog.dashboard import dashboard_of
from gpt4moe.runlog.events_log import EVENTS_FILE, last_sign_of_life, own_events, read_events
from gpt4moe.runlog.expert_load import ExpertLoad, LoadHistory, LoadWindow
from gpt4moe.runlog.goodput import goodput
from gpt4moe.runlog.interruptions import first_failures, interruptions
from gpt4moe.runlog.metrics_columns import MetricColumns
from gpt4moe.runlog.metrics_log import METRICS_FILE
from gpt4moe.runlog.run_files import EXPERT_LOAD_FILE, RESULTS_FILE, WIRE_FILE
from gpt4moe.runlog.step_lines import SAMPLES_FILE, read_step_lines


def write_run_report(
    run_folder: Path, *, samples: Sequence[Sample] = (), entropies: dict[str, float] | None = None
) -> Path:
    """Writes both files and returns the report's path.

    Args:
        entropies: "unigram" and "bigram" -> nats/token of the corpus, drawn as horizontal lines for comparison.
    """
    entropies = entropies or {}
    columns = MetricColumns.read(run_folder / METRICS_FILE)
    events = read_events(run_folder / EVENTS_FILE)
    records_of_starts = [load_yaml(path.read_text()) for path in sorted((run_folder / "starts").glob("*.yaml"))]
    starts = [_start(record) for record in records_of_starts]
    load, windows = _expert_load(run_folder)
    results = _results(run_folder)
    steps = sorted((run_folder / "checkpoints").glob("step-*/manifest.json"))
    levels = {f"{name} entropy": value for name, value in entropies.items()}
    plot_loss(run_folder / "loss.png", columns, title=run_folder.name, levels=levels)
    steps_made = columns.records_of("step_seconds")
    account = goodput(events, steps_made, last_sign_of_life=last_sign_of_life(run_folder, events))
    path = run_folder / "report.html"
    write_report(
        path,
        ReportData(
            run_name=run_folder.name,
            layout=starts[-1].layout if starts else "",
            columns=columns,
            resolved_config=(run_folder / "resolved.yaml").read_text(),
            checkpoint_path=str(steps[-1].parent) if steps else "",
            unigram_entropy=entropies.get("unigram"),
            bigram_entropy=entropies.get("bigram"),
            expert_load=load,
            load_windows=windows,
            pipeline=_pipeline(records_of_starts[-1]) if starts else None,
            wire=_wire(run_folder, records_of_starts[-1]) if starts else None,
            account=account,
            interruptions=interruptions(events, account.attempts, first_failures(run_folder)) if account else (),
            starts=starts,
            sections=dashboard_of(run_folder).sections,
            alerts=[(it["step"], it["name"], it["text"]) for it in own_events(events) if it["event"] == "alert"],
            samples=samples,
            results=results.get("table", []),
            sheets=[(said, (run_folder / name).read_bytes()) for name, said in results.get("sheets", {}).items()],
            texts=read_step_lines(run_folder / SAMPLES_FILE),
        ),
    )
    return path


def _results(run_folder: Path) -> dict[str, Any]:
    file = run_folder / RESULTS_FILE
    found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    return found


def _start(record: dict[str, Any]) -> RunStart:
    changed = [f"{key} {change['was']} -> {change['is']}" for key, change in record["changed"].items()]
    return RunStart(
        first_step=record["first_step"], when=record["time"], layout=record["layout"], note=", ".join(changed)
    )


def _pipeline(record: dict[str, Any]) -> PipelinePlan | None:
    """The schedule of a launch; None without a pipeline."""
    if record["config"]["parallel"]["pp"] == 1:
        return None
    return run_pipeline(config_from_dict(record["config"]), record["ranks"])


def _wire(run_folder: Path, record: dict[str, Any]) -> WireCount | None:
    """The byte counts of a launch; None if it has none."""
    path = run_folder / WIRE_FILE
    if not path.exists():
        return None
    stored = json.loads(path.read_text())
    if stored["step"] != record["first_step"]:
        return None
    run = config_from_dict(record["config"])
    formula = bytes_of_all_ranks(run.at_step(stored["step"]), Layout.from_config(run.parallel, stored["ranks"]))
    return WireCount(step=stored["step"], counted=stored["sent"], formula=formula)


def _expert_load(run_folder: Path) -> tuple[ExpertLoad | None, list[LoadWindow]]:
    """Expert load over the last steps, and in windows over the whole run."""
    path = run_folder / EXPERT_LOAD_FILE
    if not path.exists():
        return None, []
    stored = json.loads(path.read_text())
    load = ExpertLoad(layers=stored["layers"], tokens=stored["tokens"])
    return load, LoadHistory.from_json(stored.get("history")).windows

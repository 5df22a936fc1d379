"""A run folder as a start of a run would leave it, and what tools/runs.py says of it."""

import io
import json
import os
from pathlib import Path
from typing import Any

from rich.console import Console

from gpt4moe.operations.run_status import RunStatus, statuses
from gpt4moe.operations.run_table import runs_table
from gpt4moe.runlog.events_log import EventsLog

NOW = 1_000_000.0


def command(path: Path, *lines: str) -> None:
    path.write_text("\n".join(["#!/bin/sh", *(f"echo '{line}'" for line in lines)]) + "\n")
    path.chmod(0o755)


def a_run(folder: Path, *, steps: int = 4, stop: dict[str, Any] | None = None, job: int | None = None) -> Path:
    """Of ten steps of 2 s, started 100 s ago, `steps` of them done."""
    folder.mkdir(parents=True)
    (folder / "identity.json").write_text("{}")
    (folder / "resolved.yaml").write_text("training: {steps: 10}\n")
    with EventsLog(folder / "events.jsonl") as log:
        log.write(
            "start", at=NOW - 100, run=folder.name, job=job, submitted=None, job_started=None, ranks=1, layout="1 rank",
            total_steps=10, resumed_step=0, redone_steps=0, redone_seconds=0.0, last_sign_of_life=None,
        )  # fmt: skip
        log.write("first_step", at=NOW - 88, step=1, seconds=2.0)
        if stop:
            log.write("stop", at=NOW - 40, step=steps, **stop)
    records = [
        {"step": step, "loss": 5.0 - step, "step_seconds": 2.0, "tokens_per_second": 512.0}
        for step in range(1, steps + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    os.utime(folder / "metrics.jsonl", (NOW - 79, NOW - 79))
    return folder


def status(folder: Path) -> RunStatus:
    (found,) = statuses([folder], now=NOW)
    return found


def line(*runs: RunStatus) -> str:
    """The table as a pipe gets it, in one line."""
    stream = io.StringIO()
    Console(file=stream, width=300).print(runs_table(runs, NOW))
    return " ".join(stream.getvalue().split())

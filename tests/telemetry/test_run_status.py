"""What tools/runs.py says of run folders: states from the folder, the process, the queue; fast, and without torch."""

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from gpt4moe.errors import LaunchError
from gpt4moe.telemetry.events_log import EventsLog
from gpt4moe.telemetry.run_status import RunStatus, named_run, run_folders, statuses
from gpt4moe.telemetry.run_table import ago, runs_table

ROOT = Path(__file__).resolve().parents[2]
NOW = 1_000_000.0


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A PATH whose only commands are those that a test writes."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path / "bin"


def command(path: Path, *lines: str) -> None:
    path.write_text("\n".join(["#!/bin/sh", *(f"echo '{line}'" for line in lines)]) + "\n")
    path.chmod(0o755)


def a_run(folder: Path, *, steps: int = 4, stop: dict[str, Any] | None = None, job: int | None = None) -> Path:
    """Of ten steps of 2 s, started 100 s ago, `steps` of them done."""
    folder.mkdir(parents=True)
    (folder / "identity.json").write_text("{}")
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


@pytest.mark.parametrize(
    ("stop", "state", "why"),
    [
        ({"reason": "SIGTERM", "is_error": False}, "stopped", "SIGTERM"),
        ({"reason": "DivergenceError", "is_error": True}, "failed", "DivergenceError"),
        (None, "killed", ""),
    ],
)
def test_without_a_queue_the_folder_says_how_it_ended(
    stop: dict[str, Any], state: str, why: str, tmp_path: Path
) -> None:
    found = status(a_run(tmp_path / "x", stop=stop))
    assert (found.state, found.why, found.job, found.job_state) == (state, why, None, None)
    assert (found.step, found.total_steps, found.loss, found.tokens_per_second) == (4, 10, 1.0, 512.0)
    assert found.eta_seconds is None


def test_all_steps_done_is_finished(tmp_path: Path) -> None:
    assert status(a_run(tmp_path / "x", steps=10)).state == "finished"


def test_a_living_process_is_running_and_its_pace_gives_the_eta(tmp_path: Path) -> None:
    folder = a_run(tmp_path / "x")
    (folder / ".lock").write_text(f"process {os.getpid()} on {os.uname().nodename}")
    found = status(folder)
    assert found.state == "running"
    # Steps 2 to 4 took 9 s from the first one's event to the last line of the metrics: 3 s each, six to go.
    assert found.eta_seconds == pytest.approx(18.0)
    assert found.account is not None and found.account.share == pytest.approx(8 / 100)

    os.utime(folder / ".lock", (1.0, 1.0))
    assert status(folder).state == "killed", "the number went to a younger process"
    (folder / ".lock").write_text("process 1 on another-node")
    assert (status(folder).state, status(folder).why) == ("unknown", "on another-node")


@pytest.mark.parametrize(
    ("line", "state", "job_state"),
    [
        ("12|RUNNING|None", "running", "RUNNING"),
        ("12|PENDING|BeginTime", "waiting", "PENDING (BeginTime)"),
        ("12|FAILED|NonZeroExitCode", "killed", "FAILED"),
        ("13|RUNNING|None", "killed", None),
    ],
)
def test_the_queue_knows_better(line: str, state: str, job_state: str | None, tmp_path: Path, no_slurm: Path) -> None:
    command(no_slurm / "squeue", line)
    found = status(a_run(tmp_path / "x", job=12))
    assert (found.state, found.job, found.job_state) == (state, 12, job_state)
    if state == "waiting":
        assert found.account is not None and found.account.seconds["queue"] == pytest.approx(79.0)


def test_a_running_run_without_steps_is_told_and_one_that_has_ended_is_not(tmp_path: Path, no_slurm: Path) -> None:
    command(no_slurm / "squeue", "12|RUNNING|None")
    folder = a_run(tmp_path / "x", job=12)
    (early,) = statuses([folder], now=NOW)
    assert early.alerts == []  # no step for 79 s
    with EventsLog(folder / "events.jsonl") as log:
        log.write("alert", at=NOW + 500, step=4, name="no progress", text="told by the run itself")
    (late,) = statuses([folder], now=NOW + 501)
    (told,) = late.alerts
    assert told.name == "no progress" and told.text.startswith("step_seconds: no step for 0:09:40")
    stream = io.StringIO()
    Console(file=stream, width=200).print(runs_table([late], NOW + 501))
    assert "running (no progress)" in stream.getvalue()
    command(no_slurm / "squeue", "12|FAILED|None")
    assert statuses([folder], now=NOW + 501)[0].alerts == []


def test_a_job_that_has_left_the_queue_is_looked_up_in_the_accounts(tmp_path: Path, no_slurm: Path) -> None:
    command(no_slurm / "squeue")
    command(no_slurm / "sacct", "12|CANCELLED by 1000", "12.batch|CANCELLED")
    assert status(a_run(tmp_path / "x", job=12)).job_state == "CANCELLED"


def test_the_newest_log_names_the_job_of_a_start_that_never_began(tmp_path: Path, no_slurm: Path) -> None:
    folder = a_run(tmp_path / "x", job=12, stop={"reason": "SIGUSR2", "is_error": False})
    (folder / "logs").mkdir()
    (folder / "logs" / "14-0.log").touch()
    command(no_slurm / "squeue", "14|RUNNING|None")
    assert (status(folder).state, status(folder).job) == ("running", 14)


def test_a_damaged_run_does_not_hide_the_others(tmp_path: Path) -> None:
    a_run(tmp_path / "runs" / "good")
    (a_run(tmp_path / "runs" / "odd") / "metrics.jsonl").write_text('oops\n{"step": 2}\n')
    found = statuses(run_folders([tmp_path / "runs"]), now=NOW)
    assert [(run.name, run.state) for run in found] == [("good", "killed"), ("odd", "damaged")]
    assert "line 1" in found[1].why


def test_a_name_is_looked_up_and_a_wrong_one_names_the_nearest(tmp_path: Path) -> None:
    folder = a_run(tmp_path / "runs" / "first")
    assert named_run("first", tmp_path / "runs") == named_run(str(folder), tmp_path) == folder
    with pytest.raises(LaunchError, match="There are: first"):
        named_run("frist", tmp_path / "runs")
    with pytest.raises(LaunchError, match="none is no folder"):
        run_folders([tmp_path / "none"])


def tool(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-X", "importtime", str(ROOT / "tools" / "runs.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_tool_prints_tables_and_json_within_a_second_and_without_torch(tmp_path: Path) -> None:
    folder = a_run(tmp_path / "runs" / "first", stop={"reason": "SIGTERM", "is_error": False})
    began = time.monotonic()
    listed = tool(str(folder.parent))
    assert time.monotonic() - began < 5.0, "1 s on a quiet machine; five for a busy one"
    assert listed.returncode == 0, listed.stderr
    assert "torch" not in listed.stderr and "omegaconf" not in listed.stderr
    assert [word in listed.stdout for word in ("first", "stopped SIGTERM", "not in a queue", "4/10", "goodput")] == [
        True
    ] * 5

    shown = tool("show", str(folder)).stdout
    assert "wall time" in shown and "60.0" in shown and "1 to 4" in shown
    answer = json.loads(tool("show", str(folder), "--json").stdout)
    assert sum(answer["seconds"].values()) == pytest.approx(answer["wall_seconds"]) == 60.0
    assert (answer["goodput"], answer["starts"][0]["end"]) == (pytest.approx(8 / 60), "SIGTERM")
    assert [run["name"] for run in json.loads(tool(str(folder.parent), "--json").stdout)] == ["first"]


def test_a_narrow_terminal_folds_words_and_cuts_none(tmp_path: Path) -> None:
    stop = {"reason": "DivergenceError", "is_error": True}
    table = runs_table([status(a_run(tmp_path / "first", stop=stop))], NOW)
    stream = io.StringIO()
    Console(file=stream, width=90).print(table)
    assert "\N{HORIZONTAL ELLIPSIS}" not in stream.getvalue() and "failed" in stream.getvalue()
    assert [ago(seconds) for seconds in (-1.0, 13.2, 300.0, 10_000.0, 200_000.0)] == [
        "0 s",
        "13 s",
        "5 min",
        "3 h",
        "2 d",
    ]


def test_the_tool_refuses_with_2_and_two_lines(tmp_path: Path) -> None:
    for arguments in ([str(tmp_path / "none")], ["show", "none"]):
        ended = subprocess.run(
            [sys.executable, str(ROOT / "tools" / "runs.py"), *arguments], capture_output=True, text=True, cwd=tmp_path
        )
        assert (ended.returncode, ended.stdout, len(ended.stderr.splitlines())) == (2, "", 2)
    assert tool("show").returncode == 2
    assert "show wants one run" in tool("show").stderr

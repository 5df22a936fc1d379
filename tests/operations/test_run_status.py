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
from gpt4moe.operations.run_state import named_run, run_folders
from gpt4moe.operations.run_status import statuses
from gpt4moe.operations.run_table import ago, run_details, runs_table
from gpt4moe.runlog.events_log import EventsLog
from gpt4moe.runlog.metrics_log import read_metrics
from tests.operations.some_run import NOW, a_run, command, line, status

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A PATH whose only commands are those that a test writes."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path / "bin"


@pytest.mark.parametrize(
    ("stop", "state", "why"),
    [
        ({"reason": "SIGTERM", "is_error": False}, "stopped", "SIGTERM"),
        ({"reason": "DivergenceError", "is_error": True}, "failed", "DivergenceError"),
        ({"reason": "finished", "is_error": False}, "finished", ""),
        ({"reason": "went_back", "is_error": False}, "killed", ""),
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


def test_all_steps_done_is_finished_only_with_its_checkpoint(tmp_path: Path, no_slurm: Path) -> None:
    failed = status(a_run(tmp_path / "x", steps=10, stop={"reason": "CheckpointError", "is_error": True}))
    assert (failed.state, failed.why) == ("failed", "CheckpointError")
    folder = a_run(tmp_path / "y", steps=10, job=12)
    assert status(folder).state == "killed"
    manifest = folder / "checkpoints" / "step-00000010" / "manifest.json"
    manifest.parent.mkdir(parents=True)
    manifest.touch()
    assert status(folder).state == "finished", "the kill came when all was done"
    command(no_slurm / "squeue", "12|RUNNING|None")
    assert status(folder).state == "running", "it may still write its report"


def test_a_long_run_is_told_as_if_every_line_were_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = a_run(tmp_path / "x", steps=300)
    every = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(every[:100] + every[103:]))
    os.utime(folder / "metrics.jsonl", (NOW - 79, NOW - 79))
    glanced = status(folder)
    monkeypatch.setattr("gpt4moe.operations.run_status.glance_at_metrics", read_metrics)
    assert glanced == status(folder)
    assert glanced.wrong == ["metrics.jsonl lacks 3 steps from 101 on"]
    assert glanced.account is not None and glanced.account.seconds["productive"] == 297 * 2.0


def test_a_living_process_is_running_and_its_pace_gives_the_eta(tmp_path: Path) -> None:
    folder = a_run(tmp_path / "x")
    (folder / ".lock").write_text(f"process {os.getpid()} on {os.uname().nodename}")
    found = status(folder)
    assert found.state == "running"
    # Steps 2 to 4 took 9 s from the first one's event to the last line of the metrics: 3 s each, six to go.
    assert found.eta_seconds == pytest.approx(18.0)
    assert found.account is not None and found.account.share == pytest.approx(8 / 100)

    longer = {"step": 5, "loss": 1.0, "step_seconds": 2.0, "eta_seconds": 77.0}
    with (folder / "metrics.jsonl").open("a") as lines:
        lines.write(json.dumps(longer) + "\n")
    assert status(folder).eta_seconds != 77.0
    (folder / "identity.json").write_text('{"batch_ramp": [{"global_batch_size": 4, "until_samples": 7}]}')
    assert status(folder).eta_seconds == 77.0, "steps of other sizes to come: the run's own number counts their tokens"

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
    assert "running, stuck in a step for 10 min (no progress)" in line(late)
    command(no_slurm / "squeue", "12|FAILED|None")
    assert statuses([folder], now=NOW + 501)[0].alerts == []


def test_a_start_that_makes_no_step_is_stuck_after_ten_minutes(tmp_path: Path, no_slurm: Path) -> None:
    command(no_slurm / "squeue", "12|RUNNING|None")
    folder = a_run(tmp_path / "x", job=12, steps=0)
    events = (folder / "events.jsonl").read_text().splitlines(keepends=True)
    (folder / "events.jsonl").write_text(events[0])
    (early,) = statuses([folder], now=NOW + 500)
    (late,) = statuses([folder], now=NOW + 920)
    assert "running, in start-up for 10 min 12 RUNNING" in line(early) and not early.is_stuck
    assert "running, stuck in start-up for 17 min (no progress)" in line(late)
    # The job of another start of which there is a log and no event: its processes never found each other.
    (folder / "logs").mkdir()
    (folder / "logs" / "12-1.log").touch()
    os.utime(folder / "logs" / "12-1.log", (NOW, NOW))
    (again,) = statuses([folder], now=NOW + 1200)
    assert "stuck in start-up for 20 min" in line(again)


def test_a_first_start_that_got_no_further_than_its_log_is_a_run(tmp_path: Path, no_slurm: Path) -> None:
    (tmp_path / "runs" / "x" / "logs").mkdir(parents=True)
    log = tmp_path / "runs" / "x" / "logs" / "12-0.log"
    log.touch()
    os.utime(log, (NOW - 1200, NOW - 1200))
    command(no_slurm / "squeue", "12|RUNNING|None")
    (found,) = statuses(run_folders([tmp_path / "runs"]), now=NOW)
    assert "x running, stuck in start-up for 20 min (no progress) 12 RUNNING 0 -" in line(found)


def test_a_long_save_is_told_from_a_hang_by_those_before(tmp_path: Path, no_slurm: Path) -> None:
    command(no_slurm / "squeue", "12|RUNNING|None")
    folder = a_run(tmp_path / "x", job=12)
    with EventsLog(folder / "events.jsonl") as log:
        log.write("checkpoint", at=NOW - 60, step=2, seconds=100.0)
        log.write("pause", at=NOW - 50, what="checkpoint", step=4)
    (saving,) = statuses([folder], now=NOW + 800)
    assert "running, in checkpoint for 14 min 12 RUNNING" in line(saving) and saving.alerts == []
    (hanging,) = statuses([folder], now=NOW + 1000)
    assert "running, stuck in checkpoint for 18 min (no progress)" in line(hanging)
    assert hanging.alerts[0].text.endswith("stuck in checkpoint; before, took 100 s at most")
    with EventsLog(folder / "events.jsonl") as log:
        log.write("checkpoint", at=NOW + 1000, step=4, seconds=1050.0)
    (after,) = statuses([folder], now=NOW + 1200)
    assert after.alerts == [], "no step since 200 s"


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


def test_a_submission_refused_while_a_job_is_at_work_does_not_hide_it(tmp_path: Path, no_slurm: Path) -> None:
    folder = a_run(tmp_path / "x", job=12)
    (folder / "logs").mkdir()
    for job in (12, 14):
        (folder / "logs" / f"{job}-0.log").touch()
    command(no_slurm / "squeue", "12|RUNNING|None", "14|FAILED|NonZeroExitCode")
    found = status(folder)
    assert (found.state, found.job, found.job_state) == ("running", 12, "RUNNING")
    assert "start-up" not in line(found)


def test_starts_that_died_before_they_could_tell_are_restarts_too(tmp_path: Path) -> None:
    folder = a_run(tmp_path / "x")
    (folder / "starts").mkdir()
    for number in (1, 2, 3):
        (folder / "starts" / f"00{number}.yaml").touch()
    assert status(folder).restarts == 2


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


def test_show_tells_each_going_back_and_each_suspect_checkpoint(tmp_path: Path) -> None:
    folder = a_run(tmp_path / "x", stop={"reason": "went_back", "is_error": False})
    with EventsLog(folder / "events.jsonl") as log:
        log.write("go_back", at=NOW - 41, step=4, to_step=2, samples=24, cause="Step 4 has loss nan.")
        log.write(
            "start", at=NOW - 40, run="x", job=None, submitted=None, job_started=None, ranks=1, layout="1 rank",
            total_steps=10, resumed_step=2, redone_steps=1, redone_seconds=2.0, last_sign_of_life=None,
        )  # fmt: skip
        log.write("stop", at=NOW - 20, step=4, reason="finished", is_error=False)
    (folder / "checkpoints" / "step-00000003").mkdir(parents=True)
    (folder / "checkpoints" / "step-00000003" / "suspect.json").write_text('{"reasons": ["step 3: a spike"]}')
    found = status(folder)
    assert (found.state, found.restarts) == ("finished", 0)
    stream = io.StringIO()
    for part in run_details(found, NOW):
        Console(file=stream, width=200).print(part)
    assert "step 4 went back to step 2, 24 samples passed over: Step 4 has loss nan." in stream.getvalue()
    assert "suspect checkpoint: step-00000003: step 3: a spike" in stream.getvalue()
    assert found.account is not None and [it.end for it in found.account.attempts] == ["went_back", "finished"]


def test_show_has_one_line_for_each_interruption(tmp_path: Path) -> None:
    cause = f"Copies of {'a_tensor_with_a_long_name ' * 12} are not equal."
    run = status(a_run(tmp_path / "x", stop={"reason": "ReplicaError", "is_error": True, "cause": cause}))
    assert [it.what for it in run.interruptions] == ["ReplicaError"]
    stream = io.StringIO()
    for part in run_details(run, NOW):
        Console(file=stream, width=160).print(part)
    (line,) = [line for line in stream.getvalue().splitlines() if "a_tensor" in line]
    assert line.split()[2:4] == ["ReplicaError", "4"] and line.rstrip().endswith("...")
    assert json.dumps(run.as_dict()["interruptions"][0]["what"]) == '"ReplicaError"'

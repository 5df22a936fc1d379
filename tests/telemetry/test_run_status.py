"""What tools/runs.py says of run folders: states from the folder, the process, the queue; fast, and without torch."""

import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from gpt4moe.errors import LaunchError
from gpt4moe.telemetry.events_log import EventsLog
from gpt4moe.telemetry.run_folders import named_run, run_folders
from gpt4moe.telemetry.run_status import RunStatus, statuses
from gpt4moe.telemetry.run_table import ago, print_runs, runs_table

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


@pytest.mark.parametrize(
    ("stop", "state", "why"),
    [
        ({"reason": "SIGTERM", "is_error": False}, "stopped", "SIGTERM"),
        ({"reason": "DivergenceError", "is_error": True}, "failed", "DivergenceError"),
        ({"reason": "finished", "is_error": False}, "finished", ""),
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
    assert "running, stuck in a step for 10 min (no progress)" in line(late)
    command(no_slurm / "squeue", "12|FAILED|None")
    assert statuses([folder], now=NOW + 501)[0].alerts == []


def line(*runs: RunStatus) -> str:
    """The table as a pipe gets it, in one line."""
    stream = io.StringIO()
    Console(file=stream, width=300).print(runs_table(runs, NOW))
    return " ".join(stream.getvalue().split())


def test_a_start_that_makes_no_step_is_stuck_after_a_quarter_of_an_hour(tmp_path: Path, no_slurm: Path) -> None:
    command(no_slurm / "squeue", "12|RUNNING|None")
    folder = a_run(tmp_path / "x", job=12, steps=0)
    events = (folder / "events.jsonl").read_text().splitlines(keepends=True)
    (folder / "events.jsonl").write_text(events[0])
    (early,) = statuses([folder], now=NOW + 700)
    (late,) = statuses([folder], now=NOW + 920)
    assert "running, in start-up for 13 min 12 RUNNING" in line(early) and not early.is_stuck
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


def events_with(**fields: Any) -> bytes:
    """A start whose fields are others than they should be; `away` ones are not there."""
    unknown = dict.fromkeys(("job", "submitted", "job_started", "last_sign_of_life"))
    numbers = dict.fromkeys(("ranks", "total_steps", "resumed_step", "redone_steps", "redone_seconds"), 0)
    start = {"event": "start", "time": NOW - 90, "run": "odd", "layout": "1 rank", **unknown, **numbers, **fields}
    return json.dumps({name: value for name, value in start.items() if value != "away"}).encode() + b"\n"


DAMAGES: list[tuple[str, bytes | None, str]] = [
    ("metrics.jsonl", b'oops\n{"step": 2}\n', "damaged .*metrics.jsonl: line 1 is not a metrics record"),
    ("metrics.jsonl", b'{"step": 1, "loss": "low"}\n{"step": 2}\n', "damaged .*line 1 is not"),
    ("metrics.jsonl", b'{"step": 1, "loss": null}\n{"step": 2}\n', "damaged .*line 1 is not"),
    ("metrics.jsonl", b'{"step": 1, "nonfinite": 5}\n{"step": 2}\n', "damaged .*line 1 is not"),
    ("metrics.jsonl", b'{"step": true}\n{"step": 2}\n', "damaged .*line 1 is not"),
    ("metrics.jsonl", b"[" * 9000 + b'\n{"step": 2}\n', "damaged .*line 1 is not"),
    ("metrics.jsonl", b"\xff\x00\r\x85" * 99 + b'\n{"step": 2}\n', "damaged .*line 1 is not"),
    ("metrics.jsonl", b'{"step": 1, "loss": 1' + b"0" * 400 + b"}\n", "damaged OverflowError"),
    ("metrics.jsonl", b'{"step": 3}\n', "killed not in a queue 3/10 - -"),
    ("metrics.jsonl", b'{"step": 1, "loss": 2.0}\n{"step": 2, "los', "killed not in a queue 1/10 2.0000"),
    ("metrics.jsonl", b"", "killed not in a queue 0/10 -"),
    ("metrics.jsonl", None, "killed .metrics.jsonl is missing. not in a queue 0/10"),
    ("events.jsonl", b"", "stopped not in a queue 4/10 1.0000"),
    ("events.jsonl", None, "stopped not in a queue 4/10 1.0000"),
    ("events.jsonl", b"\xff\x00\r" * 99 + b"\n" + events_with(), "killed .events.jsonl line 1 is no JSON"),
    ("events.jsonl", b"[" * 9000 + b"\n" + events_with(), "killed .events.jsonl line 1 is no JSON"),
    ("events.jsonl", b"[1]\n" + events_with() + b'{"event": "st', "killed .events.jsonl line 1 is no event. not"),
    ("events.jsonl", events_with(run="away"), "stopped .events.jsonl line 1 is a start without run. not .* 4/10"),
    ("events.jsonl", events_with(run="away", job="away"), "stopped .events.jsonl line 1 is a start without job, run"),
    ("events.jsonl", events_with(job="seven"), "stopped .events.jsonl line 1 is a start whose job is 'seven'"),
    ("events.jsonl", events_with(time=float("nan")), "stopped .events.jsonl line 1 is a start whose time is nan"),
    ("events.jsonl", events_with(time=1e300), "stopped .events.jsonl line 1 is a start whose time is 1e.300"),
    ("events.jsonl", events_with(submitted=[1]), "stopped .events.jsonl line 1 is a start whose submitted is .1."),
    (
        "events.jsonl",
        events_with(total_steps=True),
        "stopped .events.jsonl line 1 is a start whose total_steps is True",
    ),
    ("events.jsonl", events_with(restart=-1), "stopped .events.jsonl line 1 is a start whose restart is -1"),
    ("events.jsonl", events_with(event=[]), "stopped .events.jsonl line 1 is no event"),
    ("identity.json", None, "killed .identity.json is missing. not in a queue 4/10"),
    ("identity.json", b"{", "killed .identity.json cannot be read. not in a queue 4/10"),
    ("resolved.yaml", None, "killed .resolved.yaml is missing. not in a queue 4/10"),
    ("resolved.yaml", b"\xff\x00", "killed .resolved.yaml cannot be read. not in a queue 4/10"),
    ("resolved.yaml", b"[]", "killed .resolved.yaml holds something else. not in a queue 4/10"),
    (".lock", b"process 99 on \xff\xfe", "unknown on .* not in a queue 4/10"),
    ("logs", b"no folder", "killed not in a queue 4/10"),
    ("starts", b"no folder", "killed not in a queue 4/10"),
]


@pytest.mark.parametrize(("file", "content", "said"), DAMAGES)
def test_a_damaged_run_is_one_row_that_says_why_and_hides_no_other(
    file: str, content: bytes | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a_run(tmp_path / "runs" / "good")
    place = a_run(tmp_path / "runs" / "odd") / file
    if content is None:
        place.unlink()
    else:
        place.write_bytes(content)
    good, odd = statuses(run_folders([tmp_path / "runs"]), now=NOW)
    assert (good.name, good.state, good.step) == ("good", "killed", 4)
    assert re.search(f"good killed not in a queue 4/10 .*odd {said}", line(good, odd)), line(odd)
    json.dumps(odd.as_dict())
    print_runs([odd], is_detailed=True)
    assert "odd" in capsys.readouterr().out


@pytest.mark.parametrize("file", ["metrics.jsonl", "events.jsonl", "identity.json", "resolved.yaml", ".lock"])
def test_a_folder_in_a_files_place_is_one_row_too(file: str, tmp_path: Path) -> None:
    place = a_run(tmp_path / "odd") / file
    place.unlink(missing_ok=True)
    place.mkdir()
    assert file == ".lock" or f"{file} cannot be read" in line(status(tmp_path / "odd"))


def test_a_folder_that_vanishes_or_has_a_strange_name_is_one_row(tmp_path: Path) -> None:
    a_run(tmp_path / "good")
    gone, good = statuses([tmp_path / "gone", tmp_path / "good"], now=NOW)
    assert "gone damaged its folder vanished while it was read" in line(gone, good) and good.state == "killed"
    folder = a_run(Path(os.fsdecode(os.fsencode(tmp_path) + b"/a\xff\x1b[31m")))
    assert "a??[31m killed" in line(status(folder)).encode().decode()


def test_a_folder_that_may_not_be_read_is_one_row(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory() as root:  # pytest's own are closed to other users
        a_run(Path(root) / "runs" / "good")
        a_run(Path(root) / "runs" / "shut").chmod(0)
        Path(root).chmod(0o755)
        expected = [("good", "killed", ""), ("shut", "damaged", "PermissionError:")]
        child = os.fork()
        if child == 0:
            try:
                if os.geteuid() == 0:
                    os.setuid(65534)  # a folder without permissions is open to root
                found = statuses(run_folders([Path(root) / "runs"]), now=NOW)
                os._exit([(it.name, it.state, it.why[:16]) for it in found] != expected)
            finally:
                os._exit(2)
        assert os.waitpid(child, 0)[1] == 0
        (Path(root) / "runs" / "shut").chmod(0o755)


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

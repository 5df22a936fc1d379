"""tools/runs.py outlives any file: a broken run is one row that says what is wrong, and hides no other."""

import io
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest

from gpt4moe.operations.run_state import run_folders
from gpt4moe.operations.run_status import statuses
from gpt4moe.operations.run_table import print_runs
from tests.operations.some_run import NOW, a_run, command, line, status


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))


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
    ("metrics.jsonl", b'{"step": 3, "loss": null, "nonfinite": {"loss": "nan"}}\n', "killed not in a queue 3/10 nan"),
    (
        "metrics.jsonl",
        b'{"step": 1}\n{"step": 4}\n',
        "killed .metrics.jsonl lacks 2 steps from 2 on. not in a queue 4/10",
    ),
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
    json.dumps(odd.as_dict(), allow_nan=False)
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


def test_a_running_run_with_a_wrong_value_that_only_its_rules_meet_keeps_its_job(tmp_path: Path) -> None:
    command(tmp_path / "squeue", "12|RUNNING|None")
    folder = a_run(tmp_path / "x", steps=120, job=12)
    file = folder / "metrics.jsonl"
    file.write_text(file.read_text().replace('"step": 60, "loss": -55.0', '"step": 60, "loss": "low"'))
    found = status(folder)
    assert (found.state, found.job) == ("damaged", 12) and "line 60 is not a metrics record" in found.why


def test_the_metrics_of_a_run_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole where its alerts need them, else at a glance."""
    folder, opened, real = a_run(tmp_path / "x"), list[str](), io.open

    def counting(file: object, *given: Any, **named: Any) -> Any:
        opened.append(Path(str(file)).name)
        return real(file, *given, **named)  # type: ignore[call-overload]

    monkeypatch.setattr(io, "open", counting)
    assert status(folder).state == "killed" and opened.count("metrics.jsonl") == 1
    (folder / ".lock").write_text(f"process {os.getpid()} on {os.uname().nodename}")
    opened.clear()
    assert status(folder).state == "running" and opened.count("metrics.jsonl") == 1

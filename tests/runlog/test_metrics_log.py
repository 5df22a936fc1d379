"""metrics.jsonl holds each step exactly once, to the last bit, whatever happened before."""

import errno
import json
import math
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest

from gpt4moe.errors import LaunchError
from gpt4moe.runlog.metrics_log import MetricsLog, read_metrics
from gpt4moe.runlog.metrics_table import METRICS, TIMINGS, check_record


def record(step: int) -> dict[str, float]:
    return {"step": step, "loss": 10.0 / (3 * step), "grad_norm": math.sqrt(step), "consumed_tokens": step * 4096}


def write_steps(path: Path, first: int, last: int) -> None:
    with MetricsLog.open(path, first - 1) as log:
        for step in range(first, last + 1):
            log.write(record(step))


def test_floats_come_back_to_the_last_bit(tmp_path: Path) -> None:
    values = [0.1 + 0.2, 1e-308, 5e-324, 1.7976931348623157e308, -0.0, 2.0**-60, 1 / 3]
    with MetricsLog.open(tmp_path / "metrics.jsonl") as log:
        for step, value in enumerate(values, start=1):
            log.write({"step": step, "loss": value})
    assert [r["loss"].hex() for r in read_metrics(tmp_path / "metrics.jsonl")] == [v.hex() for v in values]


def test_nonfinite_values_stay_valid_json_and_come_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog.open(path) as log:
        log.write({"step": 1, "loss": math.nan, "grad_norm": -math.inf, "z_loss": 0.5})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    assert json.loads(path.read_text(), parse_constant=refuse)["loss"] is None
    (back,) = read_metrics(path)
    assert math.isnan(back["loss"]) and back["grad_norm"] == -math.inf and back["z_loss"] == 0.5
    assert set(back) == {"step", "loss", "grad_norm", "z_loss"}


def test_a_file_cut_at_any_byte_and_resumed_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    path, whole = tmp_path / "cut.jsonl", tmp_path / "whole.jsonl"
    write_steps(whole, 1, 5)
    data = whole.read_bytes()
    third_line_end = len(b"".join(data.splitlines(keepends=True)[:3]))
    # The checkpoint is step 3 and was committed after sync(), so at least its lines are there.
    for cut in range(third_line_end - 1, len(data) + 1):
        path.write_bytes(data[:cut])
        write_steps(path, 4, 5)
        assert path.read_bytes() == data, f"cut after {cut} bytes"


def test_steps_after_the_checkpoint_are_replaced_by_the_redone_ones(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, 1, 9)
    with MetricsLog.open(path, 6) as log:
        log.write({"step": 7, "loss": 777.0})
    assert [r["step"] for r in read_metrics(path)] == [1, 2, 3, 4, 5, 6, 7]
    assert read_metrics(path)[-1]["loss"] == 777.0


def test_a_torn_last_line_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, 1, 3)
    with path.open("ab") as file:
        file.write(b'{"step": 4, "loss": 0.')
    assert [r["step"] for r in read_metrics(path)] == [1, 2, 3]


def test_zero_bytes_at_the_end_after_a_power_cut_are_mended(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, 1, 3)
    with path.open("ab") as file:
        file.write(b"\0" * 100 + b"\n" + b"\0" * 50)
    write_steps(path, 4, 4)
    assert [r["step"] for r in read_metrics(path)] == [1, 2, 3, 4]


def test_a_good_file_is_not_rewritten(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, 1, 3)
    before = path.stat().st_ino
    MetricsLog.open(path, 3).close()
    assert path.stat().st_ino == before


def test_a_damaged_line_in_the_middle_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, 1, 3)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"oops\n" + lines[2])
    with pytest.raises(LaunchError, match="line 2"):
        MetricsLog.open(path, 3)
    assert b"oops" in path.read_bytes(), "an error must not change the file"


@pytest.mark.parametrize("step", [3, 5, 1])
def test_a_step_that_is_not_the_next_is_refused(tmp_path: Path, step: int) -> None:
    write_steps(tmp_path / "metrics.jsonl", 1, 3)
    with (
        MetricsLog.open(tmp_path / "metrics.jsonl", 3) as log,
        pytest.raises(ValueError, match="cannot follow step 3"),
    ):
        log.write(record(step))


def test_a_run_that_begins_at_anothers_checkpoint_logs_from_its_next_step(tmp_path: Path) -> None:
    write_steps(tmp_path / "new" / "metrics.jsonl", 21, 22)
    assert [r["step"] for r in read_metrics(tmp_path / "new" / "metrics.jsonl")] == [21, 22]


def test_a_killed_writer_loses_no_written_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    program = (
        "import sys; from gpt4moe.runlog.metrics_log import MetricsLog\n"
        "log = MetricsLog.open(sys.argv[1])\n"
        "for step in range(1, 10**9): log.write({'step': step, 'loss': step / 3}); print(step, flush=True)"
    )
    writer = subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        assert writer.stdout is not None and writer.stdout.readline()
        time.sleep(0.05)
    finally:
        os.kill(writer.pid, signal.SIGKILL)
        told = writer.stdout.read().split("\n")[:-1]
        writer.wait()
    last_told = int(told[-1])
    write_steps(path, last_told + 1, last_told + 1)
    assert [r["step"] for r in read_metrics(path)] == list(range(1, last_told + 2))


def test_a_full_disk_is_an_error_and_not_a_silent_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = MetricsLog.open(tmp_path / "metrics.jsonl")
    real_write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: real_write(file, data[:5]))
    with pytest.raises(LaunchError, match="5 of"):
        log.write(record(1))


@pytest.mark.parametrize("is_refused", [True, False])
def test_a_disk_that_refused_a_step_does_not_complain_again_at_the_end(
    is_refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*given: object) -> int:
        raise OSError(errno.EROFS, "Read-only file system")

    log = MetricsLog.open(tmp_path / "metrics.jsonl")
    log.write(record(1))
    if is_refused:
        monkeypatch.setattr(os, "write", refuse)
        with pytest.raises(LaunchError, match="Read-only"):
            log.write(record(2))
    monkeypatch.setattr(os, "fsync", refuse)
    with nullcontext() if is_refused else pytest.raises(LaunchError, match="Read-only"):
        log.close()
    log.close()  # it is closed


@pytest.mark.parametrize("name", ["los", "los/code", "grad_norm/code", "loss/"])
def test_an_unknown_metric_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        check_record({"step": 1, name: 1.0})


@pytest.mark.parametrize("bad", [{"loss": 1.0}, {"step": 0}, {"step": 1.0}, {"step": 1, "loss": True}])
def test_a_record_without_a_whole_step_or_plain_numbers_is_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError):
        check_record(bad)


def test_the_contracts_metrics_are_in_the_table() -> None:
    contract = (
        "step loss aux_loss z_loss grad_norm learning_rate consumed_tokens step_seconds tokens_per_second eval_loss"
    )
    assert set(contract.split()) <= set(METRICS)
    assert set(METRICS) > TIMINGS > {"step_seconds", "tokens_per_second"}
    assert not TIMINGS & {"loss", "grad_norm", "consumed_tokens", "router_entropy", "eval_loss"}

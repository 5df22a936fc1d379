"""A run's own metrics against its plan: a real run of two ranks, through the train command and tools/plan.py."""

import json
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest

from gpt4moe.planner.answer import calibration_table
from gpt4moe.planner.calibrate import Compared, advice
from tests.training.command import BATCH, SEQ, metrics, train

ROOT = Path(__file__).resolve().parents[2]
RANKS, STEPS = 2, 6


def calibrated(folder: Path) -> dict[str, dict[str, float]]:
    command = [sys.executable, "tools/plan.py", f"calibrate={folder}", "output=json"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_a_real_run_is_compared_with_its_plan(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert [ended.status for ended in train(folder, "parallel.tp=2", ranks=RANKS)] == [0] * RANKS
    answer = calibrated(folder)
    steps = [record["step_seconds"] for record in metrics(folder, timings=True)]
    assert len(steps) == STEPS
    measured = median(steps[1:])  # the first fifth of the steps is warm-up
    assert answer["step"]["measured"] == measured
    assert answer["throughput"]["measured"] == pytest.approx(BATCH * SEQ / measured)
    for row in answer.values():
        assert row["predicted"] > 0 and row["measured"] > 0 and row["unit"]
    # MFU and step time are one comparison seen from two sides: the plan's own FLOPs and peak in both.
    assert answer["MFU"]["measured"] / answer["MFU"]["predicted"] == pytest.approx(
        answer["step"]["predicted"] / measured
    )


def test_the_advice_has_the_factor_and_a_plan_that_was_right_is_left_alone() -> None:
    slow = [Compared("step", "s", 1.0, 2.5)]
    assert "2.5 times the planned time" in advice(slow)
    assert "within 10%" in advice([Compared("step", "s", 1.0, 1.05)])
    assert calibration_table(slow)[1] == advice(slow)

"""A run's own metrics against its plan: a real run of two ranks, through the train command and tools/plan.py."""

import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from statistics import median

import pytest

from gpt4moe.config.load import load_plan_config
from gpt4moe.errors import ConfigError, DataError
from gpt4moe.pages.plan_answer import calibration_tables, plan_answer
from gpt4moe.planner.calibrate import advice, calibrate
from gpt4moe.planner.estimate import estimate
from tests.planner.timed import plan_of
from tests.training.command import BATCH, SEQ, metrics, train

ROOT = Path(__file__).resolve().parents[2]
RANKS, STEPS = 2, 6
DENSE = (
    "model=llama3_405b",
    "cluster=h100_80g",
    "gpus=64",
    "parallel.tp=8",
    "parallel.pp=8",
    "training.global_batch_size=64",
)


def calibrated(folder: Path) -> dict:
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
    advised = answer.pop("advice")
    assert advised[0].startswith("step: ") and "not judged" in advised[1]  # memory: a host's, not a device's
    for row in answer.values():
        assert row["predicted"] > 0 and row["measured"] > 0 and row["unit"]
    # MFU and step time are one comparison seen from two sides: the plan's own FLOPs and peak in both.
    assert answer["MFU"]["measured"] / answer["MFU"]["predicted"] == pytest.approx(
        answer["step"]["predicted"] / measured
    )


def judged(records: list[dict[str, float]], *overrides: str) -> dict[str, str]:
    """The advice on records of a run, by what it is about."""
    said = advice(calibrate(plan_of(*DENSE, *overrides), records))
    return dict(line.split(": ", 1) for line in said)


@cache
def planned() -> dict[str, float]:
    """Of the plan itself: the metrics of a run that went exactly so on its GPUs."""
    result = estimate(plan_of(*DENSE))
    tensors = max(stage.total_bytes - stage.reserve_bytes for stage in result.memory)
    return {"step_seconds": result.step.seconds, "mfu": result.mfu, "peak_memory_bytes": tensors}


def test_a_run_that_went_as_planned_is_left_alone() -> None:
    said = judged([planned()])
    assert "use its days and cost as they are" in said["step"]
    assert "use it as it is" in said["peak memory"]


def test_time_and_memory_are_judged_each_by_itself() -> None:
    slow = judged([planned() | {"step_seconds": 2.5 * planned()["step_seconds"]}])
    assert "2.5 times the planned time" in slow["step"] and "as it is" in slow["peak memory"]
    for factor in (0.25, 4):
        off = judged([planned() | {"peak_memory_bytes": factor * planned()["peak_memory_bytes"]}])
        assert "as they are" in off["step"]
        assert f"{factor} times what was planned" in off["peak memory"] and "as it is" not in off["peak memory"]


CURED = {
    "dense, bf16": DENSE,
    "dense, fp32": (*DENSE, "precision=fp32"),
    "tiny, fp32, CPU": ("model=tiny", "precision=fp32"),
    "MoE, bf16": (
        "model=qwen3_30b_a3b",
        "cluster=h100_80g",
        "gpus=32",
        "parallel.ep=32",
        "training.global_batch_size=32",
    ),
}


@pytest.mark.parametrize("overrides", CURED.values(), ids=CURED)
@pytest.mark.parametrize("factor", [0.25, 2.0])
def test_the_cure_of_calibration_applied_as_it_is_written_makes_the_plan_right(
    overrides: tuple[str, ...], factor: float
) -> None:
    """On the run that was calibrated, and in every part of a step: no key of the cluster reaches all of them."""
    before = estimate(plan_of(*overrides))
    run = [{"step_seconds": factor * before.step.seconds, "mfu": before.mfu / factor}]
    rows = calibrate(plan_of(*overrides), run)
    cure = re.search(r"set (time_factor=\S+) in", advice(rows)[0])
    assert cure, advice(rows)[0]
    cured = plan_of(*overrides, cure[1])
    assert "as they are" in advice(calibrate(cured, run))[0]
    after = estimate(cured)
    assert after.step.parts == pytest.approx({part: factor * value for part, value in before.step.parts.items()})
    assert after.memory == before.memory
    assert "time_factor" in after.warnings[-1] and "time_factor" not in before.warnings[-1]


def test_a_plan_that_has_a_time_factor_already_is_told_the_whole_of_it() -> None:
    said = judged([planned() | {"step_seconds": 3 * planned()["step_seconds"]}], "time_factor=2")["step"]
    assert "1.5 times the planned time" in said and "time_factor=3 " in said


def test_a_time_factor_that_is_none_is_refused() -> None:
    for wrong in ("0", "-1", "nan", "inf"):
        with pytest.raises(ConfigError, match="time_factor"):
            load_plan_config([f"time_factor={wrong}"])


def test_what_is_unlike_is_said_and_not_judged() -> None:
    """Host memory on CPUs; a run on other devices than its config says (no mfu); metrics without memory."""
    on_cpu = calibrate(plan_of("model=tiny"), [{"step_seconds": 1.0, "mfu": 0.1, "peak_memory_bytes": 1e9}])
    assert [row.name for row in on_cpu if row.error is None] == ["peak memory"]
    assert "not judged" in advice(on_cpu)[1] and "resident set" in advice(on_cpu)[1]
    assert calibration_tables(on_cpu)[1:] == advice(on_cpu)
    elsewhere = judged([{"step_seconds": 1.0, "peak_memory_bytes": 1e9}])
    assert "was not on cluster=h100_80g" in elsewhere["step"] and "resident set" in elsewhere["peak memory"]
    assert "has none" in judged([{"step_seconds": 1.0, "mfu": 0.1}])["peak memory"]


def test_the_load_of_experts_is_held_against_the_plans_imbalance() -> None:
    plan = plan_of("model=mixtral_8x7b", "cluster=h100_80g", "parallel.ep=8", "gpus=8")
    record = {"step_seconds": 1.0, "mfu": 0.1, "expert_load_max_over_mean": 2.0}
    assert "set imbalance=2." in advice(calibrate(plan, [record]))[1]
    plan.parallel.ep = 4
    assert "not judged" in advice(calibrate(plan, [record]))[1]


@pytest.mark.parametrize("text", ["", "config: 3\n", "a: [\n", "config: {}\nranks: many\n"])
def test_a_damaged_record_of_a_start_is_refused_by_its_name(text: str, tmp_path: Path) -> None:
    (tmp_path / "starts").mkdir()
    (tmp_path / "starts" / "001.yaml").write_text(text)
    (tmp_path / "metrics.jsonl").touch()
    plan = load_plan_config([f"calibrate={tmp_path}"])
    with pytest.raises(DataError, match=r"001.yaml is damaged"):
        plan_answer(plan)

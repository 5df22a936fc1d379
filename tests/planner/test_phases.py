"""A plan of a run whose batch and data change: each phase has its own time, and their sums are the run."""

from dataclasses import replace
from pathlib import Path

import pytest

from gpt4moe.config.load import load_plan_config
from gpt4moe.config.plan import PlanConfig
from gpt4moe.errors import LayoutError
from gpt4moe.pages.plan_answer import estimate_tables, json_answer
from gpt4moe.pages.plan_page import write_plan_page
from gpt4moe.planner.calibrate import calibrate
from gpt4moe.planner.estimate import estimate

LEVELS = "{global_batch_size: 3120, until_samples: 1e+6}, {global_batch_size: 5200, until_samples: 4e+6}"
RAMP = f"training.batch_ramp=[{LEVELS}]"
ANNEALING = "data.phases=[{from_tokens: 1.2e+13, shares: {code: 1, books: 3}}]"


def plan(*overrides: str) -> PlanConfig:
    return load_plan_config(["+experiment=gpt4", *overrides])


def test_phases_add_up_to_the_run_and_a_span_takes_what_a_run_of_its_size_takes() -> None:
    result = estimate(plan(RAMP, ANNEALING))
    sizes = [(phase.global_batch_size, phase.shares) for phase in result.phases]
    assert sizes == [(3120, None), (5200, None), (7280, None), (7280, {"code": 1, "books": 3})]
    assert [phase.first_step for phase in result.phases[:3]] == [1, 322, 899]
    assert sum(phase.steps for phase in result.phases) == result.plan.training.steps
    assert sum(phase.tokens for phase in result.phases) == result.tokens
    assert sum(phase.seconds for phase in result.phases) == pytest.approx(result.run.seconds)
    assert result.phases[3].tokens == pytest.approx(result.tokens - 1.2e13, abs=7280 * 8192)
    alone = estimate(plan("training.global_batch_size=3120", "training.steps=321"))
    assert result.phases[0].step_seconds == alone.step.seconds < result.step.seconds
    assert result.phases[0].seconds == pytest.approx(alone.run.seconds)
    assert result.memory == estimate(plan()).memory


def test_shares_that_change_cost_no_time_and_without_changes_there_is_one_phase() -> None:
    changing, steady = estimate(plan(ANNEALING)), estimate(plan())
    assert (changing.run, changing.cost, changing.tokens) == (steady.run, steady.cost, steady.tokens)
    assert [phase.steps for phase in steady.phases] == [steady.plan.training.steps]


def test_a_run_that_ends_in_its_ramp_has_the_phases_that_it_reaches() -> None:
    result = estimate(plan(RAMP, "training.steps=400", "checkpoint.every=0", "cluster.hours_between_failures=null"))
    assert [(phase.global_batch_size, phase.steps) for phase in result.phases] == [(3120, 321), (5200, 79)]
    assert result.tokens == (321 * 3120 + 79 * 5200) * 8192


def test_tables_json_and_page_have_the_phases(tmp_path: Path) -> None:
    config = plan(RAMP)
    answer, result = json_answer(config), estimate(config)
    phases = answer["phases"]
    assert isinstance(phases, list)
    assert sum(phase["usd"] for phase in phases) == pytest.approx(result.cost.usd)
    assert sum(phase["days"] for phase in phases) == pytest.approx(result.days)
    assert sum(getattr(part, "title", None) == "The run, phase by phase" for part in estimate_tables(result)) == 1
    write_plan_page(tmp_path / "plan.html", result)
    assert "322 to 898" in (tmp_path / "plan.html").read_text()


def test_a_ramp_below_the_pipeline_is_refused_with_a_size_that_fits() -> None:
    with pytest.raises(LayoutError) as refusal:
        estimate(plan("training.batch_ramp=[{global_batch_size: 2080, until_samples: 9}]"))
    assert "2080 with micro_batch_size 1 x dp 208 gives a rank 10 micro-batches" in refusal.value.cause
    assert "parallel.pp=15" in refusal.value.cause
    assert "Set training.batch_ramp[0].global_batch_size=3120" in refusal.value.cure


def test_a_calibration_compares_steps_of_one_size() -> None:
    ramped = replace(plan(RAMP), gpus=24960)
    first = estimate(ramped.at_step(1)).step.seconds
    records = [{"step": step, "step_seconds": first} for step in range(1, 101)]
    assert calibrate(ramped, records)[0].measured == pytest.approx(calibrate(ramped, records)[0].predicted)
    whole = estimate(ramped).step.seconds
    records += [{"step": step, "step_seconds": whole} for step in range(899, 901)]
    assert calibrate(ramped, records)[0].predicted == calibrate(ramped, records)[0].measured == whole


SHORTER = "training.length_ramp=[{seq_length: 4096, until_step: 1000, global_batch_size: 14560}]"


def test_a_part_of_shorter_samples_takes_the_time_memory_and_operations_of_a_run_of_them() -> None:
    result = estimate(plan(SHORTER, ANNEALING))
    first, last = result.phases[0], result.phases[-1]
    alone = estimate(plan("model.seq_length=4096", "training.global_batch_size=14560", "training.steps=1000"))
    assert [(phase.steps, phase.seq_length) for phase in result.phases[:1]] == [(1000, 4096)]
    assert first.step_seconds == alone.step.seconds != result.step.seconds == last.step_seconds
    assert first.peak_memory_bytes == alone.peak_memory_bytes < last.peak_memory_bytes == result.peak_memory_bytes
    assert first.flops == alone.flops != last.flops == result.flops
    assert first.tokens == alone.tokens == 1000 * 14560 * 4096
    assert result.tokens == sum(phase.tokens for phase in result.phases)
    steady = estimate(plan())
    assert result.tokens == steady.tokens, "a step has as many tokens throughout"
    assert result.total_flops("layers") == pytest.approx(steady.total_flops("layers"))
    assert alone.total_flops("model") < result.total_flops("model") < steady.total_flops("model")


def test_memory_is_that_of_the_steps_that_need_most() -> None:
    few = ("training.global_batch_size=208", "training.length_ramp=[{seq_length: 4096, until_step: 9, "
           "global_batch_size: 7280}]")  # fmt: skip
    result = estimate(plan(*few))
    peaks = [phase.peak_memory_bytes for phase in result.phases]
    assert peaks[0] > peaks[1], "one short micro-batch in flight needs less than many of half the length"
    assert result.peak_memory_bytes == peaks[0]


def test_a_calibration_compares_steps_of_one_length() -> None:
    changing = replace(plan(SHORTER), gpus=24960)
    first = estimate(changing.at_step(1)).step.seconds
    records = [{"step": step, "step_seconds": first} for step in range(1, 101)]
    assert calibrate(changing, records)[0].measured == pytest.approx(calibrate(changing, records)[0].predicted)

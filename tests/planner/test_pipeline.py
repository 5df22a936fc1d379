"""A pipeline step of a model: stages weigh what their FLOP say."""

import pytest

from gpt4moe.architecture.flops import flops_per_token
from gpt4moe.config.load import load_run_config
from gpt4moe.planner.pipeline_plan import checked_messages, relative_durations, run_pipeline

GPT4_RANKS = 24960


def test_stage_times_add_up_to_the_model() -> None:
    run = load_run_config(["+experiment=gpt4", "run.name=test"])
    durations = relative_durations(run.model, run.parallel)
    assert sum(durations) == pytest.approx(run.parallel.pp)
    head_share = flops_per_token(run.model).head / flops_per_token(run.model).model
    assert durations[-1] - durations[0] == pytest.approx(head_share * run.parallel.pp)
    assert durations[0] == pytest.approx(durations[7])


def test_gpt4_holds_fifteen_micro_batches_on_its_first_rank_and_its_messages_meet() -> None:
    plan = run_pipeline(load_run_config(["+experiment=gpt4", "run.name=test"]), GPT4_RANKS)
    assert plan.micro_batches == 35
    assert plan.live == list(range(15, 0, -1))
    assert plan.live_layers[0] == 15 * 8
    # The output layer makes the last stage slower, so more than (15 - 1) / 35 is idle.
    assert 14 / 35 < plan.bubble_share < 14 / 35 + 0.1
    assert checked_messages(plan) == []


def test_without_a_pipeline_nothing_is_idle() -> None:
    plan = run_pipeline(load_run_config(["+experiment=tiny", "run.name=test"]))
    assert plan.bubble_share == pytest.approx(0, abs=1e-12)
    assert plan.live == [1]

"""Seconds of a step: each part against a second opinion, and directions that physics gives."""

from functools import cache
from math import prod

import pytest

from gpt4moe.architecture.count import active_size
from gpt4moe.architecture.flops import flops_per_token
from gpt4moe.architecture.rows import Cut
from gpt4moe.architecture.trained import is_adapter
from gpt4moe.config.load import load_plan_config
from gpt4moe.config.optimizer import Dtype
from gpt4moe.config.parallel import ParallelConfig, Recompute
from gpt4moe.pipeline.schedule import schedule, simulate
from gpt4moe.planner.adapters import adapter_product
from gpt4moe.planner.estimate import estimate, timed_work
from gpt4moe.planner.step_time import STEP_PARTS, StepTime
from tests.planner.timed import plan_of, step_of

# The report says nothing of recompute, which the experiment needs to fit.
GPT4 = ("+experiment=gpt4", "parallel.recompute=none", "parallel.recompute_layers=null")
DENSE = ("model=llama3_405b", "cluster=h100_80g", "training.global_batch_size=256", "parallel.tp=8", "parallel.pp=8")


@cache
def gpt4_step() -> StepTime:
    return step_of(plan_of(*GPT4), 24960)


def test_the_parts_of_a_step_sum_up_to_it() -> None:
    step = gpt4_step()
    assert set(step.parts) == set(STEP_PARTS)
    assert step.seconds == pytest.approx(sum(step.parts.values()))
    assert min(step.parts.values()) >= 0


def test_gpt4_as_reported_runs_at_the_utilisation_that_was_reported() -> None:
    """32% to 36% of 312 TFLOP/s (SemiAnalysis, 2023-07-10); no constant of the profile was fitted to it.

    Nothing recomputed, as the report says nothing of it: memory is another question (docs/gpt4-numbers.md)."""
    plan = plan_of(*GPT4, "imbalance=1.25")  # of measured routing 1.5, with which it is 28%
    tokens = plan.training.global_batch_size * plan.model.seq_length
    peak = plan.cluster.peak_flops(Dtype.bf16) * 24960
    assert 0.32 < flops_per_token(plan.model).model * tokens / step_of(plan, 24960).seconds / peak < 0.36


@pytest.mark.parametrize(("pp", "vpp"), [(4, 1), (4, 2), (8, 4)])
def test_the_bubble_is_the_one_the_schedule_has_slot_by_slot(pp: int, vpp: int) -> None:
    plan = plan_of(*DENSE, f"parallel.pp={pp}", f"parallel.vpp={vpp}", "model.num_layers=128", "model.vocab_size=8")
    step = step_of(plan, 8 * pp)
    table = schedule(pp=pp, vpp=vpp, micro_batches=step.micro_batches)
    pace = step.stages[0]
    timeline = simulate(table, forward=pace / 3 / vpp, backward=pace * 2 / 3 / vpp)
    # The output layer of a vocabulary of 8 is all that makes the last stage another one.
    assert step.parts["bubble"] == pytest.approx(timeline.total - timeline.busy[0], rel=1e-3)


@pytest.mark.parametrize(
    ("more", "part", "grows"),
    [
        (("parallel.recompute=full",), "products", True),
        (("training.global_batch_size=512",), "bubble", False),
        (("parallel.vpp=2", "model.num_layers=128"), "bubble", False),
        (("cluster.fabric_bytes_per_second=25.0e+9", "training.global_batch_size=64"), "pp", True),
        (("cluster.memory_bytes_per_second=1.0e+12",), "elementwise", True),
        (("cluster=b200",), "products", False),
        (("training.micro_batch_size=2",), "bubble", True),
    ],
)
def test_a_part_moves_the_way_its_cause_does(more: tuple[str, ...], part: str, grows: bool) -> None:
    base = ("training.global_batch_size=64",) if "training.global_batch_size=64" in more else ()
    base += ("model.num_layers=128",) if "model.num_layers=128" in more else ()
    before = step_of(plan_of(*DENSE, *base), 64)
    after = step_of(plan_of(*DENSE, *base, *more), 64)
    share_before, share_after = (
        (step.parts[part] if part != "bubble" else step.parts[part] / step.seconds) for step in (before, after)
    )
    assert (share_after > share_before) is grows
    assert share_after != pytest.approx(share_before)


def test_expert_parallelism_beyond_the_nvlink_domain_takes_longer() -> None:
    mixture = ("model=mixtral_8x7b", "parallel.ep=8", "training.global_batch_size=64")
    inside = step_of(plan_of(*mixture, "cluster=h100_80g"), 8).parts["ep"]
    outside = step_of(plan_of(*mixture, "cluster=h100_80g", "cluster.devices_per_nvlink_domain=4"), 8).parts["ep"]
    assert outside > 2 * inside > 0


def test_an_uneven_pipeline_waits_for_its_slowest_stage() -> None:
    even = step_of(plan_of(*DENSE, "model.num_layers=128"), 64)
    listed = "parallel.layers_per_stage=[23,15,15,15,15,15,15,15]"
    uneven = step_of(plan_of(*DENSE, "model.num_layers=128", listed), 64)
    assert uneven.seconds > 1.3 * even.seconds


def test_partial_recompute_counts_the_layers_it_is_for() -> None:
    """Six of the eight layers of every stage of GPT-4's layout: three quarters of full recompute, no more."""
    model = plan_of("+experiment=gpt4").model
    some, whole = (
        flops_per_token(model, ParallelConfig(pp=15, recompute=Recompute.full, recompute_layers=layers))
        for layers in (6, None)
    )
    assert some.recompute == pytest.approx(0.75 * whole.recompute)
    assert whole.recompute == pytest.approx((whole.layers + whole.attention) / 3)
    assert some.hardware / 1e12 == pytest.approx(2.167, abs=5e-4)


def test_a_capacity_bounds_the_rows_of_the_busiest_rank_in_time_as_in_memory() -> None:
    asked = ("model=mixtral_8x7b", "cluster=h100_80g", "gpus=8", "imbalance=1.5")

    def seconds(ep: int, capacity: float | None) -> float:
        plan = plan_of(*asked, f"parallel.ep={ep}")
        assert plan.model.moe is not None
        plan.model.moe.router.capacity_factor = capacity
        return estimate(plan).step.seconds

    assert seconds(8, 1.0) < seconds(8, 1.25) < seconds(8, None) == seconds(8, 2.0)
    assert seconds(1, 0.5) < seconds(1, 1.0) == seconds(1, None)


RANK = "stage.lora.rank=16"
TUNED = ("model=mixtral_8x7b", "cluster=h100_80g", "imbalance=1", "training.global_batch_size=64")


@pytest.mark.parametrize(
    "layout", [(), ("parallel.tp=2", "parallel.ep=8"), ("parallel.tp=4", "parallel.etp=2", "parallel.ep=4")]
)
def test_products_with_adapters_are_computed_once_over_the_ranks_that_share_them(layout: tuple[str, ...]) -> None:
    work = timed_work(load_plan_config([*TUNED, RANK, *layout]))
    tokens = work.model.seq_length * work.micro_batch_size
    adapters = [tensor for tensor in work.kinds[0].tensors if is_adapter(tensor)]
    assert len(adapters) == 8
    for tensor in adapters:
        # Where experts are cut over etp, what is not cut meets the rows of every rank of the group.
        copies = work.parallel.etp if tensor.row.cut is Cut.experts_whole else 1
        computed = work.parallel.tp * prod(adapter_product(work, tensor))
        assert computed == pytest.approx(copies * tokens * active_size(work.model, tensor)), tensor.name


def test_adapters_take_less_than_training_everything_and_more_than_fewer_of_them() -> None:
    asked = (*TUNED, "gpus=16", "parallel.ep=8", "parallel.pp=2")
    everything = estimate(load_plan_config([*asked]))
    adapters = estimate(load_plan_config([*asked, RANK]))
    few = estimate(load_plan_config([*asked, RANK, "stage.lora.targets=['*self_attention*']"]))
    assert few.step.seconds < adapters.step.seconds < everything.step.seconds
    # Frozen matrices make no gradient of their own: two products of three, and what the adapters add.
    assert 2 / 3 < adapters.step.parts["products"] / everything.step.parts["products"] < 0.8
    assert (
        few.memory[0].activations_bytes < adapters.memory[0].activations_bytes < everything.memory[0].activations_bytes
    )
    assert adapters.memory[0].optimizer_bytes < everything.memory[0].optimizer_bytes / 100

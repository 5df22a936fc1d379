"""beyond.dispatch: what travels, what hides behind another micro-batch, which layouts can, how far off that may be."""

from dataclasses import replace

import pytest

from benchmarks.planner_error import by_dispatcher
from gpt4moe.config.beyond import BeyondConfig, Dispatch, overlap_problem
from gpt4moe.config.load import load_plan_config
from gpt4moe.config.parallel import ParallelConfig
from gpt4moe.errors import ConfigError, LayoutError
from gpt4moe.parallel.layout import Layout
from gpt4moe.planner.activations import layer_bytes
from gpt4moe.planner.candidates import LayoutQueue
from gpt4moe.planner.efficiency import ALL_TO_ALL_SHARE, HIDDEN_SHARE, TUNED_ALL_TO_ALL_SHARE
from gpt4moe.planner.estimate import Estimate, estimate, timed_work
from gpt4moe.planner.layer_time import HIDDEN, all_to_all_seconds, layer_seconds
from gpt4moe.planner.micro_batch import MicroBatch
from gpt4moe.planner.search import search
from gpt4moe.planner.stacks import MISSED_DISPATCH
from tests.planner.test_stacks import mixtral


def planned(dispatch: Dispatch | None, batch: int = 256, **cut: int) -> Estimate:
    plan = mixtral(beyond=BeyondConfig(dispatch=dispatch))
    plan.parallel, plan.training.global_batch_size = ParallelConfig(**{"ep": 8, "pp": 4, "vpp": 2, **cut}), batch
    plan.cluster.devices_per_nvlink_domain = 4
    return estimate(plan)


def waits(dispatch: Dispatch | None, batch: int = 256, **cut: int) -> float:
    return planned(dispatch, batch, **cut).step.parts["ep"]


def test_a_dispatch_that_sends_less_or_hides_waits_less_and_a_plain_one_is_the_trainers() -> None:
    assert 0 < waits(Dispatch.overlapped) < waits(Dispatch.tuned) < waits(None) == waits(Dispatch.plain)


@pytest.mark.parametrize(
    ("cut", "batch", "beside_another"),
    [
        ({}, 256, 32 - 5 / 2),  # of 32 micro-batches the last rank's warm-up of 4 chunks, and one more, stand alone
        ({"pp": 1, "vpp": 1}, 256, 8 - 1),  # the first forward and the last backward pass
        ({"pp": 1, "vpp": 1}, 32, 0),  # one micro-batch
        ({"pp": 4, "vpp": 1}, 256, 0),  # without interleaving Megatron overlaps nothing
    ],
)
def test_an_overlapped_dispatch_hides_only_behind_another_micro_batch(
    cut: dict[str, int], batch: int, beside_another: float
) -> None:
    whole = waits(Dispatch.tuned, batch, **cut)
    micro_batches = batch // (32 // cut.get("pp", 4))
    hidden = HIDDEN_SHARE * whole * beside_another / micro_batches
    found = planned(Dispatch.overlapped, batch, **cut)
    assert found.step.parts["ep"] == pytest.approx(whole - hidden)
    assert any("overlapped hides nothing" in line for line in found.warnings) is (micro_batches == 1)


def test_a_tuned_dispatch_sends_once_to_a_rank_and_an_overlapped_one_hides_behind_computation_alone() -> None:
    """Top 2 of 8 experts on 8 ranks of one domain: 8 x (1 - (7/8)^2) = 15/8 ranks of a token instead of 2 copies."""
    plain, tuned = (timed_work(mixtral(beyond=BeyondConfig(dispatch=one))) for one in (Dispatch.plain, Dispatch.tuned))
    share = ALL_TO_ALL_SHARE / TUNED_ALL_TO_ALL_SHARE * 15 / 16
    assert all_to_all_seconds(tuned, 1e9) == pytest.approx(all_to_all_seconds(plain, 1e9) * share)
    slow = replace(tuned, cluster=replace(tuned.cluster, nvlink_bytes_per_second=2e9))  # so that it outlasts
    whole = layer_seconds(slow, slow.kinds[0])
    computed = sum(whole[part] for part in ("products", "attention", "elementwise"))
    assert whole[HIDDEN] == pytest.approx(computed) and whole[HIDDEN] < HIDDEN_SHARE * whole["ep"]


def test_a_layout_that_cannot_overlap_is_refused_and_no_search_shows_one() -> None:
    asked = ["model=mixtral_8x7b", "cluster=h100", "gpus=32", "training.global_batch_size=256",
             "beyond.dispatch=overlapped"]  # fmt: skip
    for layout, cause in (
        (["parallel.ep=8", "parallel.pp=4"], "pp=4 with vpp=1"), ([], "ep=1 sends no rows"),
        (["parallel.ep=8", "parallel.recompute=full"], "recompute=full"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=cause):
            load_plan_config([*asked, *layout])
    queue = LayoutQueue.of(load_plan_config([*asked, "search=true", "top=1"]), 32)
    assert queue.waiting and all(overlap_problem(one.parallel) is None for one in queue.waiting)
    assert all(queue.timed(one).seconds >= one.seconds for one in queue.waiting[:40]), "else the fastest may be missed"
    alone = load_plan_config(["model=tiny", "cluster=h100", "gpus=1", "search=true", "beyond.dispatch=overlapped"])
    with pytest.raises(LayoutError) as refused:
        search(alone)
    assert "beyond.dispatch=tuned" in refused.value.cure


def test_what_is_said_beside_full_recomputation_works_as_it_stands() -> None:
    asked = ["model=mixtral_8x7b", "cluster=h100", "gpus=32", "training.global_batch_size=256", "parallel.ep=8",
             "beyond.dispatch=overlapped", "parallel.recompute=full"]  # fmt: skip
    with pytest.raises(ConfigError) as refused:
        load_plan_config(asked)
    for one in refused.value.cure.removesuffix(".").split(" or "):
        changes = [word.rstrip(",;") for word in one.split() if "=" in word]
        kept = [old for old in asked if old.split("=")[0] not in {new.split("=")[0] for new in changes}]
        load_plan_config([*kept, *changes])


def test_what_would_help_a_plan_without_room_is_allowed_beside_an_overlapped_dispatch() -> None:
    for dispatch, may in ((Dispatch.overlapped, False), (Dispatch.tuned, True)):
        found = planned(dispatch, pp=2)
        (said,) = [line for line in found.warnings if "does not fit" in line]
        assert ("parallel.recompute=full" in said) is may and "micro_batch_size" not in said and "parallel.tp" in said


def test_an_overlapped_dispatch_keeps_a_layer_more() -> None:
    found = []
    for dispatch in (Dispatch.tuned, Dispatch.overlapped):
        plan = mixtral(beyond=BeyondConfig(dispatch=dispatch))
        plan.parallel.vpp = 2
        found.append(estimate(plan).memory[0].activations_bytes)
    micro = MicroBatch.of(plan, Layout.from_config(plan.parallel, 32), plan.imbalance)
    assert found[1] - found[0] == layer_bytes(micro, 0)


def test_an_interval_is_wide_enough_for_another_dispatcher_than_the_stacks() -> None:
    def interval(dispatch: Dispatch | None) -> tuple[float, float, str]:
        plan = mixtral(stack="megatron-core-2025", beyond=BeyondConfig(dispatch=dispatch))
        plan.parallel.vpp = 2
        found = estimate(plan).interval
        assert found is not None
        return found.least, found.most, found.of

    own, plain, tuned = interval(None), interval(Dispatch.plain), interval(Dispatch.tuned)
    assert (
        own == plain and tuned[0] == -0.286 < own[0] and tuned[1] == own[1] and "whose dispatch was tuned" in tuned[2]
    )
    assert interval(Dispatch.overlapped)[1] == 0.137 > own[1]
    for one, errors in by_dispatcher().items():
        assert MISSED_DISPATCH[one] == pytest.approx((len(errors), min(errors), max(errors)), abs=1e-3)

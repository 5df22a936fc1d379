"""One truth for bytes: what a step is timed for is what planner.communication says is sent, which the wire test holds
to the bytes counted at the collectives (tests/distributed/test_wire.py)."""

from dataclasses import replace

import pytest

from gpt4moe.config.cluster import Generation
from gpt4moe.config.plan import PlanConfig
from gpt4moe.parallel.layout import Layout
from gpt4moe.planner.communication import Traffic, bytes_per_step
from gpt4moe.planner.efficiency import ALL_TO_ALL_SHARE, RING_SHARE, planning_profile
from gpt4moe.planner.layer_time import layer_seconds
from gpt4moe.planner.step_time import after_seconds, heaviest_stage, message_seconds
from gpt4moe.planner.work import Work
from tests.planner.timed import plan_of, work_of

# One NVLink domain for all, so that a byte costs the same in every group; stages alike, so that any of them is the
# heaviest but for the vocabulary.
WORLD = 64
BASE = (
    "model=mixtral_8x7b", "cluster=h100_80g", "cluster.devices_per_nvlink_domain=64", "training.global_batch_size=64",
    "model.vocab_size=32000", "parallel.pp=4",
)  # fmt: skip
LAYOUTS = {
    "tp": ("parallel.tp=4",),
    "tp, ep, interleaved": ("parallel.tp=2", "parallel.ep=8", "parallel.vpp=2"),
    "experts cut": ("parallel.tp=4", "parallel.ep=4", "parallel.etp=2"),
    "cp, two sequences": ("parallel.cp=4", "parallel.ep=2", "training.micro_batch_size=2"),
    "dense": ("model.moe=null", "model.ffn_hidden_size=14336", "parallel.tp=4", "parallel.cp=2"),
    "shared experts": ("model.moe.shared_expert_ffn_hidden_size=14336", "parallel.tp=2", "parallel.ep=2"),
}


def told(name: str) -> tuple[PlanConfig, Work, Traffic]:
    """The plan, what is timed, and the bytes of an inner stage, with even routing."""
    plan = plan_of(*BASE, *(o for o in LAYOUTS[name] if o.split("=")[0] != "model.moe"))
    if "model.moe=null" in LAYOUTS[name]:
        plan.model.moe = None
    layout = Layout.from_config(plan.parallel, WORLD)
    return plan, replace(work_of(plan), imbalance=1.0), bytes_per_step(plan, layout, stage=1)


def sent(traffic: Traffic, group: str, *kinds: str) -> float:
    return sum(traffic.get(group, {}).get(kind, 0.0) for kind in kinds)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layers_are_timed_for_the_bytes_that_they_send(name: str) -> None:
    plan, work, traffic = told(name)
    dp = WORLD // (plan.parallel.tp * plan.parallel.cp * plan.parallel.pp)
    micro_batches = plan.training.global_batch_size // (plan.training.micro_batch_size * dp)
    layers = micro_batches * plan.model.num_layers // plan.parallel.pp
    seconds = layer_seconds(work, work.kinds[0])
    rate, exposed = plan.cluster.nvlink_bytes_per_second, work.efficiency.exposed
    rings = {group: sent(traffic, group, "all_gather", "reduce_scatter") for group in ("tp", "cp", "etp")}
    assert rings["tp"] + rings["cp"] > 0
    for group in ("tp", "cp"):
        assert layers * seconds[group] == pytest.approx(exposed * rings[group] / (RING_SHARE * rate))
    crossed = sent(traffic, "ep", "all_to_all") / (ALL_TO_ALL_SHARE * rate)
    assert layers * seconds["ep"] == pytest.approx(crossed + rings["etp"] / (RING_SHARE * rate))


@pytest.mark.parametrize("generation", Generation)
def test_a_plan_of_ours_hides_nothing_of_what_goes_to_experts(generation: Generation) -> None:
    """Our layers wait for their all-to-all; only dense communication takes the share that a stack's rows say."""
    _, work, _ = told("tp, ep, interleaved")
    ours = replace(work, efficiency=planning_profile(generation))
    bare = replace(ours, efficiency=replace(ours.efficiency, exposed=1.0))
    assert layer_seconds(ours, ours.kinds[0])["ep"] == layer_seconds(bare, bare.kinds[0])["ep"] > 0


@pytest.mark.parametrize("name", LAYOUTS)
def test_messages_gradients_and_weights_are_timed_for_the_bytes_that_are_sent(name: str) -> None:
    plan, work, traffic = told(name)
    parallel, fabric = plan.parallel, plan.cluster.fabric_bytes_per_second
    dp = WORLD // (parallel.tp * parallel.cp * parallel.pp)
    micro_batches = plan.training.global_batch_size // (plan.training.micro_batch_size * dp)
    messages = 2 * parallel.vpp * micro_batches * message_seconds(work)
    assert messages == pytest.approx(work.efficiency.exposed * sent(traffic, "pp", "send") / (RING_SHARE * fabric))
    # Without a pass to hide behind. The heaviest stage counts: it has the embedding or the head too.
    layout = Layout.from_config(parallel, WORLD)
    stages = [bytes_per_step(plan, layout, stage=stage) for stage in range(parallel.pp)]
    kinds = ("reduce_scatter", "all_gather")
    most = max(sent(stage, "dp_cp", *kinds) + sent(stage, "expert_dp", *kinds) for stage in stages)
    bare = after_seconds(work, WORLD, 0.0, heaviest_stage(work))["dp"]
    assert bare == pytest.approx(most / (RING_SHARE * plan.cluster.nvlink_bytes_per_second))

"""A checkpoint of any layout goes on on any other: the state tensor by tensor, the next losses, Adam's step count."""

import itertools
import os
import random
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from tests.checkpoint.hop import Hop, State, hop
from tests.distributed.layouts import LAYOUTS, LayoutCase
from tests.distributed.vision import PARTS

pytestmark = pytest.mark.layouts

STEPS = 2  # a hop
WALKS = max(2, int(os.environ.get("LAYOUT_DRAWS", "0")) // 10)  # `make test-layouts` walks more of them
# Nothing may pool over a micro-batch where its size changes, else the losses differ by design.
NOTHING_POOLS = ("model.moe.router.load_balancing_coefficient=0",)
UNEVEN = LayoutCase(2, ("parallel.pp=2", "parallel.layers_per_stage=[1,3]"))
FOUR_LAYERS = {"one": LayoutCase(1, ()), "pp2-uneven": UNEVEN} | {
    name: case for name, case in LAYOUTS.items() if not case.model
}


def walk(layouts: list[tuple[LayoutCase, tuple[str, ...]]], overrides: tuple[str, ...], folder: Path) -> list[Hop]:
    """One hop of STEPS steps on each layout, each from the checkpoint of the one before."""
    hops: list[Hop] = []
    load = None
    for number, (layout, more) in enumerate(layouts):
        steps = range(1 + number * STEPS, 1 + (number + 1) * STEPS)
        save = folder / f"step-{steps.stop - 1:08d}"
        hops.append(hop(layout.world_size, (*layout.overrides, *overrides, *more), steps=steps, load=load, save=save))
        load = save
    return hops


@cache
def uninterrupted(steps: int, overrides: tuple[str, ...] = ()) -> Hop:
    return hop(1, overrides, steps=range(1, steps + 1))


def assert_equal(got: State, want: State) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)


def assert_goes_on(hops: list[Hop]) -> None:
    """The state after every load is bit for bit the one that was saved, and has counted its steps."""
    for number, (before, after) in enumerate(itertools.pairwise(hops), start=1):
        assert_equal(after.loaded, before.final)
        assert after.optimizer_steps == {number * STEPS}


def assert_losses_follow(hops: list[Hop], want: Hop, *, rtol: float = 2e-6) -> None:
    # The order of sums differs by layout: 1e-7 over ten steps was measured.
    np.testing.assert_allclose([loss for each in hops for loss in each.losses], want.losses, rtol=rtol)


@pytest.mark.parametrize("seed", range(WALKS))
def test_a_walk_over_random_layouts_follows_the_run_that_never_stopped(seed: int, tmp_path: Path) -> None:
    names = random.Random(seed).sample(sorted(FOUR_LAYERS), 5)
    hops = walk([(FOUR_LAYERS[name], ()) for name in names], (), tmp_path)
    assert_goes_on(hops)
    assert_losses_follow(hops, uninterrupted(5 * STEPS))


def test_dp_micro_batch_and_pp_change_at_once(tmp_path: Path) -> None:
    layouts = [
        (LAYOUTS["pp4"], ("training.micro_batch_size=2",)),
        (LAYOUTS["dp3"], ("training.micro_batch_size=4",)),
        (LAYOUTS["pp2-dp2-ep2"], ("training.micro_batch_size=1",)),
        (FOUR_LAYERS["one"], ("training.micro_batch_size=6",)),
    ]
    hops = walk(layouts, NOTHING_POOLS, tmp_path)
    assert_goes_on(hops)
    assert_losses_follow(hops, uninterrupted(4 * STEPS, NOTHING_POOLS))


def test_more_virtual_stages_go_on_on_any_pipeline(tmp_path: Path) -> None:
    eight = LAYOUTS["pp4-vpp2"]
    hops = walk([(eight, ()), (LAYOUTS["tp2-pp2-ep2"], ()), (LAYOUTS["pp2-vpp2"], ())], eight.shared, tmp_path)
    assert_goes_on(hops)
    assert_losses_follow(hops, uninterrupted(3 * STEPS, eight.shared))


def test_context_parallel_and_expert_tensor_parallel_are_layouts_as_others_are(tmp_path: Path) -> None:
    names = ("tp2-cp2-ep2-etp2", "dp3", "pp2-cp2-ep2", "dp2-etp2")
    hops = walk([(FOUR_LAYERS[name], ()) for name in names], (), tmp_path)
    assert_goes_on(hops)
    assert_losses_follow(hops, uninterrupted(4 * STEPS))


def test_router_biases_and_shared_experts_reach_every_replica(tmp_path: Path) -> None:
    """A bias is no parameter: it is stored once and loaded by every rank of its stage (hop asserts it for each)."""
    model = (
        "router@model.moe.router=sigmoid_bias", "model.moe.router.bias_update_rate=0.01",
        "model.moe.router.load_balancing_scope=global_batch", "model.moe.shared_expert_ffn_hidden_size=24",
        # Adam's first step divides a gradient by its own size + epsilon. Where that size is about 1e-8 (others reach
        # 1e-2), the order of fp32 sums changes a tenth of it, and with it up to 1e-4 of a weight. With epsilon=1e-8 the
        # losses differ by 3e-6, 1.6e-5 or 4e-3, by the CPU's vector instructions; so they do in one process whose first
        # weights are rounded otherwise (24 draws: half above 1e-5, three at 4.5e-3). With 1e-5: 3e-7 at most.
        "optimizer.epsilon=1e-5",
    )  # fmt: skip
    hops = walk([(FOUR_LAYERS[name], ()) for name in ("tp2-pp2-ep2", "one", "pp2-vpp2")], model, tmp_path)
    routers = [f"buffer/decoder.layers.{layer}.mlp.router" for layer in range(4)]
    # A bias may go up and down again: not all layers of a hop need to have moved.
    assert max(np.abs(hops[0].final[f"{router}.bias"]).max() for router in routers) >= 0.01
    assert all(hops[0].final[f"{router}.load_share"].sum() == pytest.approx(1) for router in routers)
    assert_goes_on(hops)
    want = uninterrupted(3 * STEPS, model)
    assert_losses_follow(hops, want)
    for router in routers:
        np.testing.assert_array_equal(hops[-1].final[f"{router}.bias"], want.final[f"{router}.bias"])


def test_vision_parts_are_stored_once_and_reach_every_stage(tmp_path: Path) -> None:
    """A resampler has a copy on every rank (hop asserts that each is loaded). Epsilon: as for router biases above."""
    vision = (*PARTS, "optimizer.epsilon=1e-5")
    layouts = [(LAYOUTS["tp2-pp2-ep2"], ()), (FOUR_LAYERS["one"], ()), (LAYOUTS["pp2-dp2-ep2"], ("engine=deepspeed",))]
    hops = walk(layouts, vision, tmp_path)
    assert_equal(hops[1].loaded, hops[0].final)
    assert_equal(hops[2].loaded, hops[1].final)
    gates = [np.abs(hops[0].final[f"weight/decoder.layers.{layer}.gated_cross_attention.mlp_gate"]) for layer in (0, 2)]
    assert min(gates) > 0
    assert "exp_avg/resampler.latents" in hops[0].final and "exp_avg/output_layer.weight" not in hops[0].final
    assert_losses_follow(hops, uninterrupted(3 * STEPS, vision))


def test_tied_embeddings_are_stored_once_and_reach_both_ends(tmp_path: Path) -> None:
    tied = ("model.tied_embeddings=true",)
    hops = walk([(LAYOUTS["tp2-pp2-ep2"], ()), (FOUR_LAYERS["one"], ()), (LAYOUTS["pp2-vpp2"], ())], tied, tmp_path)
    assert "weight/output_layer.weight" not in hops[0].final
    assert_goes_on(hops)
    assert_losses_follow(hops, uninterrupted(3 * STEPS, tied))


def test_bf16_masters_and_moments_are_bit_equal_on_another_layout(tmp_path: Path) -> None:
    layouts = [(LAYOUTS[name], ()) for name in ("tp2-pp2-ep2", "dp3", "tp2-dp2-ep4")]
    hops = walk(layouts, ("precision=bf16",), tmp_path)
    assert_goes_on(hops)
    masters = hops[0].final["weight/decoder.layers.0.mlp.experts.down"]
    assert (masters.view(np.uint32) & 0xFFFF).any(), "masters keep the bits that bf16 weights lack"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_on_the_same_layout_the_resumed_run_is_bit_equal(precision: str, tmp_path: Path) -> None:
    layout, overrides = LAYOUTS["tp2-pp2-ep2"], (f"precision={precision}",)
    hops = walk([(layout, ()), (layout, ())], overrides, tmp_path)
    whole = hop(layout.world_size, (*layout.overrides, *overrides), steps=range(1, 2 * STEPS + 1))
    assert [loss for each in hops for loss in each.losses] == whole.losses
    assert_equal(hops[-1].final, whole.final)

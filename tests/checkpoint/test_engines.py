"""Checkpoints pass between the engines: what one saved the other goes on from, on another layout, bit for bit."""

from pathlib import Path

import pytest

from tests.checkpoint.hop import hop
from tests.checkpoint.test_any_to_any import (
    FOUR_LAYERS,
    STEPS,
    assert_equal,
    assert_goes_on,
    assert_losses_follow,
    uninterrupted,
    walk,
)
from tests.distributed.layouts import LAYOUTS

pytestmark = pytest.mark.layouts

DEEPSPEED = ("engine=deepspeed",)
OFFLOADED = (*DEEPSPEED, "engine.offload_optimizer=true")


def test_the_engines_take_turns_and_follow_the_run_that_never_stopped(tmp_path: Path) -> None:
    layouts = [
        (LAYOUTS["tp2-pp2-ep2"], ()),
        (LAYOUTS["dp3"], DEEPSPEED),
        (LAYOUTS["pp2-dp2-ep2"], OFFLOADED),
        (LAYOUTS["pp2-vpp2"], ()),
        (LAYOUTS["tp2-ep2"], DEEPSPEED),
    ]
    hops = walk(layouts, (), tmp_path)
    assert_goes_on(hops)
    assert_losses_follow(hops, uninterrupted(len(layouts) * STEPS))


def test_bf16_masters_and_moments_are_bit_equal_under_the_other_engine(tmp_path: Path) -> None:
    layouts = [(LAYOUTS["tp2-pp2-ep2"], DEEPSPEED), (LAYOUTS["dp3"], ()), (FOUR_LAYERS["one"], DEEPSPEED)]
    assert_goes_on(walk(layouts, ("precision=bf16",), tmp_path))


@pytest.mark.parametrize("overrides", [DEEPSPEED, (*OFFLOADED, "precision=bf16")], ids=["fp32", "bf16-offload"])
def test_on_the_same_layout_the_resumed_run_is_bit_equal(overrides: tuple[str, ...], tmp_path: Path) -> None:
    layout = LAYOUTS["pp2-dp2-ep2"]
    hops = walk([(layout, ()), (layout, ())], overrides, tmp_path)
    whole = hop(layout.world_size, (*layout.overrides, *overrides), steps=range(1, 2 * STEPS + 1))
    assert [loss for each in hops for loss in each.losses] == whole.losses
    assert_equal(hops[-1].final, whole.final)

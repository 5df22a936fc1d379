"""Twenty free-running AdamW steps stay together on every layout, in fp32 and bf16."""

from functools import cache

import numpy as np
import pytest

from tests.distributed.case import Outcome, outcome
from tests.distributed.layouts import LAYOUTS
from tests.distributed.test_gradients import distance

pytestmark = pytest.mark.layouts

STEPS = 20
BF16 = ("precision=bf16",)


@cache
def one_process(overrides: tuple[str, ...] = (), steps: int = STEPS) -> Outcome:
    return outcome(1, overrides, steps=steps)


@pytest.mark.parametrize("name", LAYOUTS)
def test_twenty_adamw_steps_follow_one_process(name: str) -> None:
    layout = LAYOUTS[name]
    got, want = outcome(layout.world_size, (*layout.model, *layout.overrides), steps=STEPS), one_process(layout.model)
    np.testing.assert_allclose(got.losses, want.losses, atol=1e-4)
    np.testing.assert_allclose(got.norms, want.norms, rtol=1e-3)


@pytest.mark.parametrize("name", ["dp3", "tp2-pp2-ep2", "pp2-vpp2"])
def test_weights_after_adamw_steps_equal_one_process(name: str) -> None:
    layout, want = LAYOUTS[name], one_process(steps=3)
    got = outcome(layout.world_size, layout.overrides, steps=3)
    for parameter, value in want.weights.items():
        # Adam divides by the gradient's own size: where that is near zero, round-off is a whole step of lr (0.003).
        assert distance(got.weights[parameter], value) <= 1e-4, parameter


@cache
def bf16_spread(model: tuple[str, ...]) -> dict[str, float]:
    """How far one process in bf16 moves by rounding alone: its gradients against the same weights in fp32."""
    rounded, exact = one_process((*model, *BF16), steps=1), one_process(model, steps=1)
    return {name: distance(rounded.gradients[name], gradient) for name, gradient in exact.gradients.items()}


@pytest.mark.parametrize("name", LAYOUTS)
def test_bf16_gradients_are_as_near_to_fp32_as_one_process_is(name: str) -> None:
    layout = LAYOUTS[name]
    exact = one_process(layout.model, steps=1)
    got = outcome(layout.world_size, (*layout.model, *layout.overrides, *BF16), steps=1)
    for parameter, gradient in exact.gradients.items():
        assert distance(got.gradients[parameter], gradient) <= 3 * bf16_spread(layout.model)[parameter], parameter


def test_the_shipped_tiny_model_follows_one_process_for_twenty_steps() -> None:
    """At its own size, batch and learning rate. Round-off flips a top-2 choice now and then, at any step: until the
    first flip, which the loads show, the norms are equal; after it they stay near, and so do the losses."""
    tiny = ("+experiment=tiny", "run.name=test", "data=mock")
    want = outcome(1, steps=STEPS, base=tiny)
    got = outcome(4, LAYOUTS["tp2-pp2-ep2"].overrides, steps=STEPS, base=tiny)
    moved = [int(np.abs(a[:, :16] - b[:, :16]).sum()) // 2 for a, b in zip(got.routing, want.routing, strict=True)]
    steady = next((step for step, count in enumerate(moved) if count), STEPS)
    assert steady >= 5
    assert moved[steady:][:1] < [5], "the first to move are a few of 32,768 choices"
    np.testing.assert_allclose(got.norms[:steady], want.norms[:steady], rtol=1e-4)
    np.testing.assert_allclose(got.norms, want.norms, rtol=1e-2)
    np.testing.assert_allclose(got.losses, want.losses, atol=1e-4)
    assert distance(np.array(got.norms[:1]), np.array(want.norms[:1])) < 1e-6

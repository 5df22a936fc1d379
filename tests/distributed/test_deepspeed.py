"""engine=deepspeed equals one process under engine=megatron: gradients, norms, clipped and AdamW steps, bf16."""

import numpy as np
import pytest

from gpt4moe.proof import plan
from tests.distributed.case import outcome, outcomes
from tests.distributed.layouts import LAYOUTS, LayoutCase
from tests.distributed.runs import RATE, bf16_differences, rounded_phases
from tests.distributed.runs import one_process as one_process_runs
from tests.distributed.test_gradients import GRADIENT, TIED, assert_same, distance, one_process

pytestmark = pytest.mark.layouts

ENGINE = ("engine=deepspeed",)
OFFLOAD = ("engine.offload_optimizer=true",)
# Every degree, alone with the partitions of dp or with another degree.
LAYOUTS_SHOWN = {"one": LayoutCase(1, ())} | {
    name: LAYOUTS[name]
    for name in (
        "pp2-vpp2",
        "dp2-ep2",
        "tp2-ep2",
        "pp2-dp2-ep2",
        "tp2-pp2-ep2",
        "tp2-dp2-ep2-etp2",
        "pp2-cp2-ep2",
    )
}


@pytest.mark.parametrize(
    ("name", "more"),
    [*((name, ()) for name in LAYOUTS_SHOWN), ("dp2-ep2", OFFLOAD)],
)
def test_gradients_norms_and_adamw_steps_equal_one_process(name: str, more: tuple[str, ...]) -> None:
    layout = LAYOUTS_SHOWN[name]
    want = one_process_runs(layout)["three"]
    got = outcome(layout.world_size, (*layout.overrides, *ENGINE, *more), steps=3)
    for parameter, gradient in want.gradients.items():
        assert distance(got.gradients[parameter], gradient) <= GRADIENT, parameter
    assert want.norms[0] > 0.5, "the first step must be clipped for this test to see the norm"
    np.testing.assert_allclose(got.norms[0], want.norms[0], rtol=1e-6, equal_nan=False)
    # Adam divides by the gradient's own size: where that is near zero, round-off is a whole step of lr (0.003).
    np.testing.assert_allclose(got.losses, want.losses, rtol=1e-5, equal_nan=False)
    for parameter, value in want.weights.items():
        assert distance(got.weights[parameter], value) <= 1e-4, parameter


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("tp2-pp2-ep2", TIED),
        ("pp2-vpp2", TIED),
        # The first stage has dense layers only: it has no expert group, and must not wait for one.
        ("pp2-dp2-ep2", ("model.moe.layer_pattern=[0,0,1,1]", "model.ffn_hidden_size=48")),
        ("dp2", ("model.moe=null", "model.ffn_hidden_size=48")),
    ],
    ids=["tied", "tied-vpp2", "dense-first-stage", "dense"],
)
def test_clipped_descent_equals_one_process(name: str, model: tuple[str, ...]) -> None:
    assert_descends_as_one_process(name, model)


@pytest.mark.parametrize(
    ("name", "recompute"),
    [
        ("tp2-pp2-vpp2-ep2", ("parallel.recompute=moe",)),
        ("pp2-vpp2-cp2-etp2", ("parallel.recompute=full", "parallel.recompute_layers=1")),
        ("cp2", ("parallel.recompute=selective",)),
    ],
    ids=["moe", "full", "selective"],
)
def test_what_is_computed_again_is_added_once(name: str, recompute: tuple[str, ...]) -> None:
    """DeepSpeed hooks the backward pass of every parameter; a second forward pass must not run a hook twice."""
    assert_descends_as_one_process(name, layout=recompute)


def assert_descends_as_one_process(name: str, model: tuple[str, ...] = (), layout: tuple[str, ...] = ()) -> None:
    case, want = LAYOUTS[name], one_process(model, steps=3)
    got = outcome(case.world_size, (*case.overrides, *ENGINE, *model, *layout), steps=3, sgd=RATE)
    assert all(norm > 0.5 for norm in want.norms), "every step must be clipped for this test to see the norm"
    assert_same(got, want)


@pytest.mark.parametrize("engine", ["megatron", "deepspeed"])
def test_copies_of_a_tied_embedding_stay_equal_where_three_ranks_add_up(engine: str) -> None:
    """Three numbers in another order are another sum: both stages must add theirs up in one (outcome looks)."""
    shared = (*TIED, "model.num_layers=2", "training.global_batch_size=18")
    got = outcome(6, ("parallel.pp=2", f"engine={engine}", *shared), steps=2, sgd=RATE)
    assert_same(got, one_process(shared, steps=2))


def test_experts_without_tokens_have_zero_gradients_and_change_nothing_else() -> None:
    layout, overrides = LAYOUTS["dp2-ep2"], ("model.moe.num_experts=8",)
    got = outcome(layout.world_size, (*layout.overrides, *overrides, *ENGINE), steps=1, sgd=RATE, starve=True)
    for layer in range(4):
        assert not got.gradients[f"decoder.layers.{layer}.mlp.experts.down"][4:].any()
    assert_same(got, one_process(overrides, steps=1, starve=True))


@pytest.mark.parametrize(
    ("name", "more"), [("pp2-dp2-ep2", ()), ("tp2-ep2", OFFLOAD)], ids=["pp2-dp2-ep2", "tp2-ep2-offload"]
)
def test_bf16_steps_are_as_near_to_fp32_as_one_process_is_and_follow_from_their_gradients(
    name: str, more: tuple[str, ...]
) -> None:
    layout = LAYOUTS[name]
    phases = rounded_phases(layout.world_size, (*layout.shared, *layout.overrides, *ENGINE, *more))
    assert bf16_differences(layout, outcomes(layout.world_size, phases)[plan.ROUNDED]) == []

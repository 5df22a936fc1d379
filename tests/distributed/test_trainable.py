"""Parts frozen by stage.train and adapters of stage.lora train on every layout and engine as in one process."""

from functools import cache

import numpy as np
import pytest

from gpt4moe.architecture.tensors import logical_shapes
from gpt4moe.architecture.trained import trained_names
from gpt4moe.config.load import load_run_config
from gpt4moe.proof.plan import Phase
from tests.distributed.case import BASE, Outcome, outcomes
from tests.distributed.layouts import LAYOUTS
from tests.distributed.test_gradients import TIED, assert_same, distance

pytestmark = pytest.mark.layouts

DENSE_FIRST = ("model.moe.layer_pattern=[0,1,1,1]", "model.ffn_hidden_size=48")
CASES = {
    "experts alone": ("stage.train=['*experts*']",),
    # On two stages: the first trains nothing.
    "the end alone": ("stage.train=['decoder.layers.3.*','output_layer.weight']",),
    # The last stage trains nothing, and the first layer's input needs no gradient.
    "a router alone": ("stage.train=['decoder.layers.0.mlp.router.weight']",),
    "a tied embedding is frozen": (*TIED, "stage.train=['*norm*','*linear_proj*']"),
    "adapters": ("stage.lora.rank=4", "stage.lora.alpha=64", *DENSE_FIRST),
    "adapters of shared experts": (
        "stage.lora.rank=2", "stage.lora.targets=['*shared_experts*']", "model.moe.shared_expert_ffn_hidden_size=16",
    ),
    "a router with a bias stands still": ("stage.train=['*linear_qkv*']", "router@model.moe.router=sigmoid_bias"),
}  # fmt: skip
RATES = {
    "rates by pattern": (
        "optimizer.by_pattern=[{tensors:'*router*',lr_factor:0},{tensors:'*norm*',lr_factor:3,weight_decay:5},"
        "{tensors:'*experts.down',weight_decay:20}]",
    ),
    "rates of adapters": ("stage.lora.rank=2", "optimizer.by_pattern=[{tensors:'*lora_b',lr_factor:16}]"),
    "the same rates": (),
}  # fmt: skip
"""Steps of AdamW."""
SHOWN = {
    "pp2-vpp2": ("parallel.recompute=full",),
    "pp2-dp2-ep2": ("engine=deepspeed",),
    "tp2-pp2-ep2": (),
    "tp2-cp2-ep2-etp2": ("parallel.recompute=moe",),
    "tp2-dp2-ep2-etp2": ("engine=deepspeed",),
}
"""Layouts of the table, and what else they try."""


@cache
def trained(world_size: int, layout: tuple[str, ...]) -> dict[str, Outcome]:
    """Every case after three clipped steps; its ranks start once."""
    phases = {
        name: Phase(run=load_run_config([*BASE, *case, *layout]), steps=3, descent=0.3 if "lora" in str(case) else 0.05)
        for name, case in CASES.items()
    }
    updates = {name: Phase(run=load_run_config([*BASE, *case, *layout]), steps=3) for name, case in RATES.items()}
    return outcomes(world_size, phases | updates)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", SHOWN)
def test_gradients_norms_and_weights_equal_one_process(name: str, case: str) -> None:
    layout = LAYOUTS[name]
    want, got = trained(1, ())[case], trained(layout.world_size, (*layout.overrides, *SHOWN[name]))[case]
    assert_same(got, want)
    for buffer, values in want.tensors["buffer"].items():
        np.testing.assert_array_equal(got.tensors["buffer"][buffer], values, err_msg=buffer)


@pytest.mark.parametrize("case", CASES)
def test_only_what_is_named_has_gradients_and_counts_in_the_norm(case: str) -> None:
    run = load_run_config([*BASE, *CASES[case]])
    got = trained(1, ())[case]
    assert got.gradients.keys() == trained_names(run.model, run.stage) < logical_shapes(run.model).keys()
    norm = np.sqrt(sum(np.square(gradient, dtype=np.float64).sum() for gradient in got.gradients.values()))
    assert got.norms[0] == pytest.approx(norm, rel=1e-6)
    for values in got.tensors["buffer"].values():
        assert not values.any(), "the buffers of a frozen router do not move"


@pytest.mark.parametrize("case", RATES)
@pytest.mark.parametrize("name", SHOWN)
def test_updates_by_pattern_equal_one_process(name: str, case: str) -> None:
    layout = LAYOUTS[name]
    want, got = trained(1, ())[case], trained(layout.world_size, (*layout.overrides, *SHOWN[name]))[case]
    np.testing.assert_allclose(got.losses, want.losses, rtol=1e-5)
    for parameter, value in want.weights.items():
        # Adam divides by the gradient's own size: where that is near zero, round-off is a whole step.
        assert distance(got.weights[parameter], value) <= 1e-3, parameter


def test_each_entry_of_by_pattern_moves_its_own_tensors() -> None:
    run = load_run_config(list(BASE))
    plain, own = trained(1, ())["the same rates"].weights, trained(1, ())["rates by pattern"].weights
    for name, value in own.items():
        router, norm = name.endswith("router.weight"), "norm" in name
        if norm:  # three steps of 3 x 0.003 and a decay of 5: about 1 - 3 x 0.045
            assert value.mean() < 0.92 < plain[name].mean(), name
        if name.endswith("experts.down"):
            ratio = np.linalg.norm(value) / np.linalg.norm(plain[name])
            assert ratio == pytest.approx((1 - 20 * run.optimizer.lr) ** 3, abs=0.03), name
        if router:
            assert not np.array_equal(value, plain[name]), name
    start = outcomes(1, {"": Phase(run=run, steps=1, descent=0.0)})[""].weights
    for name in (name for name in own if name.endswith("router.weight")):
        np.testing.assert_array_equal(own[name], start[name])


def test_adapters_move_and_the_first_loss_is_that_of_the_base() -> None:
    got = trained(1, ())["adapters"]
    base = outcomes(1, {"": Phase(run=load_run_config([*BASE, *DENSE_FIRST]), steps=1, descent=0.1)})[""]
    assert got.losses[0] == base.losses[0]  # to the bit
    assert got.losses[1] != got.losses[0]
    run = load_run_config([*BASE, *CASES["adapters"]])
    shapes = logical_shapes(run.model)
    for name, values in got.weights.items():
        assert values.shape == shapes[name]
        is_expert = ".experts." in name
        assert all(part.any() for part in values) if is_expert else values.any(), f"{name}: each expert must move"

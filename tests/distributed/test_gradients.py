"""Gradients, norm and weights of one process for models and routers beside the usual one; test_layouts.py has that on
every layout."""

from functools import cache

import numpy as np
import pytest

from tests.distributed.case import Outcome, descents, outcome
from tests.distributed.layouts import LAYOUTS
from tests.distributed.runs import RATE

pytestmark = pytest.mark.layouts

TIED = ("model.tied_embeddings=true",)
# An fp32 sum in another order moves a tensor by about 1e-6 of its norm here; a lost rank or a wrong scale by 1e-1.
GRADIENT, NORM, WEIGHT = 1e-5, 1e-6, 1e-5


@cache
def one_process(overrides: tuple[str, ...], steps: int, starve: bool = False) -> Outcome:
    return outcome(1, overrides, steps=steps, sgd=RATE, starve=starve)


def distance(ours: np.ndarray, reference: np.ndarray) -> float:
    """|ours - reference| / |reference|; of a zero reference, |ours|."""
    scale = float(np.linalg.norm(reference.astype(np.float64)))
    return float(np.linalg.norm(ours.astype(np.float64) - reference)) / (scale or 1.0)


def assert_same(got: Outcome, want: Outcome, *, weight: float = WEIGHT) -> None:
    assert got.gradients.keys() == want.gradients.keys()
    for name, gradient in want.gradients.items():
        assert distance(got.gradients[name], gradient) <= GRADIENT, name
    np.testing.assert_allclose(got.norms, want.norms, rtol=NORM, equal_nan=False)
    np.testing.assert_allclose(got.losses, want.losses, rtol=1e-6, equal_nan=False)
    for name, value in want.weights.items():
        assert distance(got.weights[name], value) <= weight, name


@pytest.mark.parametrize("name", ["pp2-vpp2", "tp2-pp2-ep2"])
def test_tied_embeddings_equal_one_process(name: str) -> None:
    layout = LAYOUTS[name]
    got = outcome(layout.world_size, (*layout.overrides, *TIED), steps=3, sgd=RATE)
    assert "output_layer.weight" not in got.gradients
    assert_same(got, one_process(TIED, steps=3))


def test_norms_of_queries_and_keys_and_heads_of_their_own_width_equal_one_process() -> None:
    """Under tp every rank sees other heads: a norm's gradient is the sum over all of them."""
    layout, overrides = LAYOUTS["tp2"], ("model.qk_norm=true", "model.head_dim=12")
    got = outcome(layout.world_size, (*layout.overrides, *overrides), steps=3, sgd=RATE)
    want = one_process(overrides, steps=3)
    norms = [f"decoder.layers.{layer}.self_attention.{part}_layernorm.weight" for layer in range(4) for part in "qk"]
    assert all(want.gradients[name].shape == (12,) and np.abs(want.gradients[name]).max() > 1e-4 for name in norms)
    assert_same(got, want)


@pytest.mark.parametrize("name", ["dp2-ep2", "tp2-pp2-ep2"])
def test_experts_without_tokens_have_zero_gradients_and_change_nothing_else(name: str) -> None:
    layout, overrides = LAYOUTS[name], ("model.moe.num_experts=8",)
    got = outcome(layout.world_size, (*layout.overrides, *overrides), steps=1, sgd=RATE, starve=True)
    want = one_process(overrides, steps=1, starve=True)
    assert (want.routing[0][:, 4:8] == 0).all()
    for layer in range(4):
        assert not got.gradients[f"decoder.layers.{layer}.mlp.experts.down"][4:].any()
    assert_same(got, want)


DROPPING = {
    "by probability": ("model.moe.router.capacity_factor=0.8", "model.moe.router.drop_policy=probability"),
    "by position": ("model.moe.router.capacity_factor=0.8", "model.moe.router.drop_policy=position"),
    "switch": ("router@model.moe.router=switch", "model.moe.top_k=1"),
}


@cache
def dropping(world_size: int, layout: tuple[str, ...]) -> dict[str, Outcome]:
    cases = {name: (*layout, *overrides) for name, overrides in DROPPING.items()}
    return descents(world_size, cases, steps=2, rate=RATE)


@pytest.mark.parametrize("router", DROPPING)
@pytest.mark.parametrize("name", ["tp2-pp2-ep2", "tp2-cp2-ep2-etp2"])
def test_routers_with_capacity_drop_the_same_tokens_on_every_layout(name: str, router: str) -> None:
    """A capacity counts the whole micro-batch, whatever ranks its tokens are on."""
    layout = LAYOUTS[name]
    got, want = dropping(layout.world_size, layout.overrides)[router], dropping(1, ())[router]
    assert want.routing[0][:, 4].min() > 0, "every layer must drop something"
    np.testing.assert_array_equal(got.routing[0][:, :5], want.routing[0][:, :5])
    assert_same(got, want)


@pytest.mark.parametrize(
    ("layout", "pattern"),
    [
        (("tp=2", "ep=2", "pp=2", "layers_per_stage=[1,3]"), ("model.moe.layer_pattern=[0,1,0,1]",)),
        # 1, 2, 2 and 1 layers, of which layer 4 alone, on the third stage, has experts.
        (
            ("pp=4", "embedding_counts_as_layer=true", "head_counts_as_layer=true"),
            ("model.num_layers=6", "model.moe.layer_frequency=2", "model.moe.dense_first_layers=3"),
        ),
    ],
    ids=["dense-between", "stages-of-dense-layers-alone"],
)
def test_dense_layers_and_uneven_stages_equal_one_process(layout: tuple[str, ...], pattern: tuple[str, ...]) -> None:
    pattern = (*pattern, "model.ffn_hidden_size=48")
    parallel = tuple(f"parallel.{key}" for key in layout)
    assert_same(outcome(4, (*parallel, *pattern), steps=3, sgd=RATE), one_process(pattern, steps=3))


def test_a_dense_model_equals_one_process() -> None:
    dense = ("model.moe=null", "model.ffn_hidden_size=48")
    got = outcome(4, ("parallel.pp=2", "parallel.tp=2", *dense), steps=2, sgd=RATE)
    assert_same(got, one_process(dense, steps=2))

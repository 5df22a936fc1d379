"""Every kind of router, with what a run may switch on beside it, is on a layout what it is in one process."""

from dataclasses import dataclass, field
from functools import cache

import numpy as np
import pytest

from gpt4moe.proof.outcome import BUFFER
from tests.distributed.case import Outcome, descents, outcome
from tests.distributed.layouts import LAYOUTS
from tests.distributed.runs import RATE
from tests.distributed.test_gradients import assert_same

pytestmark = pytest.mark.layouts

STEPS = 3
SMALL = ("model.num_layers=2",)
BIAS_RATE = 0.02
TP_PP_EP, TP_CP = LAYOUTS["tp2-pp2-ep2"].overrides, ("parallel.tp=2", "parallel.cp=2", "parallel.ep=4")
ROUTER = "model.moe.router"
LOSSES = (f"{ROUTER}.load_balancing_coefficient=0.1", f"{ROUTER}.z_loss_coefficient=0.01")


@dataclass(frozen=True)
class RouterCase:
    """A router, and the layout of four ranks that it is tried on."""

    layout: tuple[str, ...]
    router: tuple[str, ...]
    buffers: frozenset[str] = field(default_factory=frozenset)
    """What its routers keep between steps."""


CASES = {
    "sigmoid_bias with shared experts, experts recomputed": RouterCase(
        (*TP_PP_EP, "parallel.recompute=moe"),
        (f"router@{ROUTER}=sigmoid_bias", f"{ROUTER}.bias_update_rate={BIAS_RATE}", f"{ROUTER}.scaling_factor=2.5",
         "model.moe.shared_expert_ffn_hidden_size=48"),
        frozenset({"bias"}),
    ),
    "group_limited with two groups of four, layers recomputed": RouterCase(
        (*TP_PP_EP, "parallel.recompute=full"),
        (f"router@{ROUTER}=group_limited", f"{ROUTER}.bias_update_rate={BIAS_RATE}", f"{ROUTER}.num_groups=4",
         f"{ROUTER}.group_topk=2", "model.moe.num_experts=8", "model.moe.top_k=3"),
        frozenset({"bias"}),
    ),
    "switch with jitter and drops": RouterCase(
        TP_CP, (f"router@{ROUTER}=switch", "model.moe.top_k=1", f"{ROUTER}.input_jitter=0.1",
                f"{ROUTER}.capacity_factor=0.8"),
    ),
    "top2 with jitter under pp": RouterCase(TP_PP_EP, (f"{ROUTER}.input_jitter=0.1",)),
    "top2 balanced per sequence": RouterCase(TP_CP, (f"{ROUTER}.load_balancing_scope=sequence",)),
    "top2 balanced per global batch": RouterCase(
        TP_PP_EP, (f"{ROUTER}.load_balancing_scope=global_batch",), frozenset({"load_share"})
    ),
}  # fmt: skip


@cache
def in_one_process() -> dict[str, Outcome]:
    cases = {name: (*SMALL, *case.router, *LOSSES) for name, case in CASES.items()}
    return descents(1, cases, steps=STEPS, rate=RATE)


@cache
def on_ranks(layout: tuple[str, ...]) -> dict[str, Outcome]:
    """The cases whose mesh is `layout`."""
    cases = {
        name: (*SMALL, *case.router, *LOSSES, *case.layout) for name, case in CASES.items()
        if case.layout[: len(layout)] == layout
    }  # fmt: skip
    return descents(4, cases, steps=STEPS, rate=RATE)


@pytest.mark.parametrize("name", CASES)
def test_a_router_routes_learns_and_balances_as_in_one_process(name: str) -> None:
    case = CASES[name]
    mesh = next(mesh for mesh in (TP_PP_EP, TP_CP) if case.layout[: len(mesh)] == mesh)
    got, want = on_ranks(mesh)[name], in_one_process()[name]
    assert_same(got, want)
    np.testing.assert_allclose(
        got.routing, want.routing, rtol=1e-5, atol=1e-7, equal_nan=False
    )  # counts are equal to the bit
    np.testing.assert_array_equal(np.array(got.columns(None)), np.array(want.columns(None)))
    names = {f"decoder.layers.{layer}.mlp.router.{kept}" for layer in range(2) for kept in case.buffers}
    assert got.tensors[BUFFER].keys() == want.tensors[BUFFER].keys() == names
    for kept, value in want.tensors[BUFFER].items():
        np.testing.assert_array_equal(got.tensors[BUFFER][kept], value, err_msg=kept)
    assert_is_worth_comparing(want, case)


def assert_is_worth_comparing(want: Outcome, case: RouterCase) -> None:
    """What the case is about has happened."""
    gradients = [value for name, value in want.gradients.items() if name.endswith("router.weight")]
    assert len(gradients) == 2 and all(np.linalg.norm(value) > 1e-3 for value in gradients)
    if "bias" in case.buffers:
        biases = np.array(list(want.tensors[BUFFER].values()))
        assert (biases > 0).any() and (biases < 0).any()
    if any("capacity_factor=0.8" in override for override in case.router):
        assert all((dropped > 0).all() for dropped in want.columns(["dropped"]))


def test_the_language_model_alone_teaches_every_router_of_a_model() -> None:
    """Without auxiliary losses. What it teaches is tests/moe/test_router_gradient.py's."""
    silent = tuple(loss.partition("=")[0] + "=0" for loss in LOSSES)
    found = descents(1, {name: (*SMALL, *case.router, *silent) for name, case in CASES.items()}, steps=1, rate=RATE)
    for name, one in found.items():
        learned = [value for key, value in one.gradients.items() if key.endswith("router.weight")]
        assert len(learned) == 2
        for of_layer in learned:
            # A row an expert: each of them, of every layer, gets more than round-off.
            assert np.linalg.norm(of_layer, axis=1).min() > 1e-4, name


def test_noise_and_the_scope_of_the_balance_change_what_is_learned() -> None:
    """Else the cases above would compare runs in which neither was on."""
    runs = {
        name: outcome(1, (*SMALL, *LOSSES, *more))
        for name, more in {
            "plain": (), "jitter": (f"{ROUTER}.input_jitter=0.1",),
            "sequence": (f"{ROUTER}.load_balancing_scope=sequence",),
        }.items()
    }  # fmt: skip
    router = "decoder.layers.0.mlp.router.weight"
    for name in ("jitter", "sequence"):
        assert np.linalg.norm(runs[name].gradients[router] - runs["plain"].gradients[router]) > 1e-3, name


def test_under_bf16_a_bias_moves_by_fp32_steps_on_every_rank() -> None:
    case = CASES["sigmoid_bias with shared experts, experts recomputed"]
    got = outcome(4, (*SMALL, *case.router, *LOSSES, *TP_PP_EP, "precision=bf16"), steps=STEPS)
    for name, bias in got.tensors[BUFFER].items():
        moves = bias / np.float32(BIAS_RATE)
        # bf16 would keep 0.06 as 0.06006, 3.003 steps.
        np.testing.assert_allclose(moves, moves.round(), atol=1e-5, err_msg=name)
        assert 0 < np.abs(moves).max() <= STEPS + 1e-5

"""Router buffers that the proof makes of loads are those that the routers make themselves."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from gpt4moe.config.load import load_run_config
from gpt4moe.config.moe import ROUTER_TRAITS, RouterBuffer, RouterKind, RouterTraits
from gpt4moe.moe.routers import build_router
from gpt4moe.proof.compare import distance
from gpt4moe.proof.proof_report import unproved
from gpt4moe.proof.replay import buffers
from gpt4moe.proof.shrink import shrink
from tests.distributed.case import BASE

LOADS = torch.tensor([[[9.0, 3, 0, 4], [4, 4, 4, 4]], [[2, 6, 7, 1], [8, 5, 0, 3]], [[4, 4, 5, 3], [1, 6, 7, 2]]])
"""Of three steps, two layers."""


@pytest.mark.parametrize("layer", [0, 1])
def test_replayed_buffers_are_the_routers_own_and_half_a_step_is_far_from_them(layer: int) -> None:
    run = load_run_config([*BASE, "router@model.moe.router=sigmoid_bias", "model.moe.router.bias_update_rate=0.02",
                           "model.moe.router.load_balancing_scope=global_batch"])  # fmt: skip
    assert run.model.moe is not None
    router = build_router(nn.Parameter(torch.zeros(4, 32)), run.model.moe)
    for loads in LOADS:
        router.finish_step(loads[layer].double())
    own = {f"decoder.layers.{layer}.mlp.router.{name}": buffer.numpy() for name, buffer in router.named_buffers()}
    assert len(own) == 2
    got: Any = SimpleNamespace(columns=lambda _: list(LOADS.double().numpy()))
    for name, made in buffers(got, own, run).items():
        assert distance(own[name], made) < 1e-6, "three sums in fp32"
        assert distance(own[name] / 2, made) == pytest.approx(0.5, abs=1e-5)
    assert not np.allclose(own[f"decoder.layers.{layer}.mlp.router.bias"], 0)


def test_a_buffer_without_a_rule_is_left_out_and_listed_as_not_proved(monkeypatch: pytest.MonkeyPatch) -> None:
    run = load_run_config([*BASE, "precision=bf16"])
    got: Any = SimpleNamespace(columns=lambda _: list(LOADS.double().numpy()))
    assert buffers(got, ["decoder.layers.0.mlp.router.running_load"], run) == {}
    traits = RouterTraits(buffers=(RouterBuffer(name="running_load"),))
    monkeypatch.setitem(ROUTER_TRAITS, RouterKind.topk, traits)
    assert any("running_load" in line for line in unproved(shrink(run)))

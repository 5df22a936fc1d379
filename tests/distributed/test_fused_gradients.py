"""kernels.weight_gradients=fused: on every kind of layout the gradients and weights of one process without it."""

from functools import cache
from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel import layers

from gpt4moe.config.load import load_run_config
from gpt4moe.moe import weight_gradients
from gpt4moe.parallel.environment import Environment
from gpt4moe.proof.outcome import Outcome, assemble
from gpt4moe.proof.plan import Phase
from gpt4moe.proof.ranks import run_phases
from tests.distributed.case import BASE, outcomes
from tests.distributed.runs import RATE
from tests.distributed.test_gradients import TIED, assert_same
from tests.spawn import run_ranks

pytestmark = pytest.mark.layouts

FUSED = "kernels.weight_gradients=fused"
SHARED = ("model.moe.shared_expert_ffn_hidden_size=16", "model.moe.layer_pattern=[0,1]", "model.ffn_hidden_size=48")
CASES = {
    "shared experts, a dense layer": SHARED,
    "tied": TIED,
    "recompute": (*SHARED, "parallel.recompute=full"),
    "experts recomputed": (*TIED, "parallel.recompute=moe"),
    "buckets that are reduced early": ("engine.overlap_grad_reduce=true", "engine.bucket_size=3000"),
    "frozen": ("stage.train=['*experts.down','*linear_proj*','*norm*']",),
    "adapters": ("stage.lora.rank=4", "stage.lora.alpha=64"),
    "the output layer alone": ("stage.train=['output_layer.weight']",),
}
LAYOUTS = {
    "one": (),
    "tp2-pp2-ep2": ("parallel.tp=2", "parallel.pp=2", "parallel.ep=2"),
    "dp2-cp2-etp2": ("parallel.cp=2", "parallel.etp=2"),
}


def steps(*more: str) -> dict[str, Phase]:
    """Two steps of plain descent for each case, of several micro-batches each."""
    return {
        name: Phase(run=load_run_config([*BASE, "model.num_layers=2", *overrides, *more]), steps=2, descent=RATE)
        for name, overrides in CASES.items()
    }


def fused_phases(environment: Environment, phases: list[Phase]) -> tuple[list[Any], int]:
    """run_phases, and how many products added themselves. What nobody may read is NaN."""
    plain, added = torch.empty, weight_gradients.add_product
    count = 0

    def counted(*args: Any) -> None:
        nonlocal count
        count += 1
        added(*args)

    class Torch:
        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

        def empty(self, *args: Any, **named: Any) -> torch.Tensor:
            return plain(*args, **named).fill_(torch.nan)

    weight_gradients.add_product = counted
    layers.torch = weight_gradients.torch = Torch()
    return run_phases(environment, phases), count


@cache
def one_process() -> dict[str, Outcome]:
    return outcomes(1, steps("parallel.recompute=none"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_and_weights_equal_those_of_one_process_that_adds_none_itself(layout: str) -> None:
    overrides = LAYOUTS[layout]
    answers = run_ranks(4 if overrides else 1, fused_phases, list(steps(*overrides, FUSED).values()))
    assert min(count for _, count in answers) > 0
    for at, name in enumerate(CASES):
        got = assemble([found[at] for found, _ in answers])
        assert got.problems == [], name
        assert_same(got, one_process()[name])

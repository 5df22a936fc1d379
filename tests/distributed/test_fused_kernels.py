"""The rotary embedding, the cross-entropy and the router by the functions around our Triton kernels, on CPUs.

With what stands for the kernels in torch's operations (tests/model/plain_kernels.py), a step's gradients equal those of
Megatron's way, and of the plain router, on one process."""

from functools import cache
from typing import Any
from unittest.mock import patch

import pytest

from gpt4moe.config.kernels import FusedKernel
from gpt4moe.config.load import load_run_config
from gpt4moe.model import cross_entropy, rotary
from gpt4moe.moe.routers import softmax_choice
from gpt4moe.parallel.environment import Environment
from gpt4moe.proof.outcome import Outcome, assemble
from gpt4moe.proof.plan import Phase
from gpt4moe.proof.ranks import run_phases
from tests.distributed.case import BASE, outcomes
from tests.distributed.runs import DOCUMENTS, RATE
from tests.distributed.test_gradients import assert_same
from tests.model.plain_kernels import CrossEntropyKernels, RotaryKernels, RouterKernels
from tests.spawn import run_ranks

pytestmark = pytest.mark.layouts

CASES = {
    "documents": (DOCUMENTS,),
    "norms": (
        "model.qk_norm=true",
        "model.head_dim=12",
        "training.micro_batch_size=1",
        "router@model.moe.router=switch",
        "model.moe.top_k=1",
    ),
    "deepspeed": ("engine=deepspeed", "model.num_query_groups=null", "parallel.recompute=full"),
}
CALLS = ("split", "join", "sums", "gradients", "choose", "choice_gradients")


def steps(*layout: str) -> dict[str, Phase]:
    """Two steps of plain descent for each case."""
    return {
        name: Phase(run=load_run_config([*BASE, "model.num_layers=2", *overrides, *layout]), steps=2, descent=RATE)
        for name, overrides in CASES.items()
    }


def fused_phases(environment: Environment, phases: list[Phase]) -> tuple[list[Any], dict[str, int]]:
    """run_phases with what `auto` is on GPUs, and how often each kernel was called."""
    calls = dict.fromkeys(CALLS, 0)

    class Counted:
        def __init__(self, kernels: type) -> None:
            self.kernels = kernels

        def __getattr__(self, name: str) -> Any:
            calls[name] += 1
            return getattr(self.kernels, name)

    with (
        patch.object(FusedKernel, "is_triton", lambda wish, on_gpu: True),
        patch.object(rotary, "kernels", lambda: Counted(RotaryKernels)),
        patch.object(cross_entropy, "kernels", lambda: Counted(CrossEntropyKernels)),
        patch.object(softmax_choice, "kernels", lambda: Counted(RouterKernels)),
    ):
        return run_phases(environment, phases), calls


@cache
def one_process() -> dict[str, Outcome]:
    """By Megatron's way."""
    return outcomes(1, steps())


@pytest.mark.parametrize("layout", [(), ("parallel.tp=2", "parallel.cp=2", "parallel.ep=2")], ids=["one", "tp2-cp2"])
def test_gradients_equal_megatrons_way(layout: tuple[str, ...]) -> None:
    phases = steps(*layout)
    answers = run_ranks(4 if layout else 1, fused_phases, list(phases.values()))
    assert all(min(calls.values()) > 0 for _, calls in answers)
    for at, name in enumerate(phases):
        got = assemble([found[at] for found, _ in answers])
        assert got.problems == [], name
        assert_same(got, one_process()[name])

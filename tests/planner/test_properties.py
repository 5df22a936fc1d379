"""Properties of a plan: single changes of it, on seven models, move time, memory and money the way physics says."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import reduce
from operator import eq, ge, gt, le, lt
from typing import Any

import pytest

from gpt4moe.config.beyond import Module, Products
from gpt4moe.config.optimizer import Dtype, EngineConfig, EngineKind
from gpt4moe.config.parallel import Recompute
from gpt4moe.config.plan import PlanConfig
from gpt4moe.planner.estimate import Estimate, estimate
from tests.planner.timed import plan_of

MODELS = ("deepseek_v3", "gpt4_16x111b", "gpt_oss_120b", "llama3_405b", "mixtral_8x7b", "mixtral_8x22b",
          "qwen3_235b_a22b")  # fmt: skip
LAYOUT = ("cluster=h100_80g", "gpus=128", "training.global_batch_size=128", "parallel.tp=2", "parallel.pp=4")
OFFLOAD = EngineConfig(kind=EngineKind.deepspeed, overlap_grad_reduce=False, offload_optimizer=True)
Moves = dict[str, Callable[[float, float], bool]]
"""Quantity -> how it compares with what it was before the change."""


def times(factor: float) -> Callable[[Any], Any]:
    """None, what a model does not have, stays so."""
    return lambda value: None if value is None else type(value)(factor * value)


def becomes(value: Any) -> Callable[[Any], Any]:
    return lambda _: value


CHANGES: Sequence[tuple[str, Callable[[Any], Any], Moves]] = (
    ("cluster.peak_flops_bf16", times(2), {"step": lt, "memory": eq, "usd": lt}),
    ("cluster.memory_bytes_per_second", times(2), {"step": lt, "memory": eq}),
    ("cluster.nvlink_bytes_per_second", times(2), {"step": lt, "memory": eq}),
    ("cluster.fabric_bytes_per_second", times(0.5), {"step": gt, "memory": eq}),
    ("cluster.devices_per_nvlink_domain", becomes(1), {"step": gt, "memory": eq}),
    ("cluster.memory_bytes", times(2), {"step": eq, "memory": eq, "usd": eq}),
    ("cluster.usd_per_hour", times(2), {"step": eq, "usd": gt}),
    ("cluster.watts", times(2), {"step": eq, "kwh": gt}),
    ("cluster.hours_between_failures", times(0.1), {"step": eq, "days": gt, "usd": gt}),
    ("gpus", times(2), {"step": lt, "optimizer": lt}),
    ("restart_minutes", times(6), {"step": eq, "days": gt}),
    ("time_factor", times(2), {"step": gt, "memory": eq, "days": gt}),
    ("training.steps", times(2), {"step": eq, "days": gt, "usd": gt}),
    ("training.global_batch_size", times(2), {"step": gt, "weights": eq, "bubble": lt}),
    ("training.micro_batch_size", becomes(2), {"activations": gt, "weights": eq, "bubble": gt}),
    ("model.seq_length", times(2), {"step": gt, "activations": gt, "weights": eq}),
    ("model.vocab_size", times(2), {"step": gt, "weights": gt}),
    ("model.ffn_hidden_size", times(2), {"step": ge, "weights": ge}),
    ("parallel.tp", times(2), {"activations": lt, "weights": lt}),
    ("parallel.pp", times(2), {"weights": lt, "bubble": gt}),
    ("parallel.vpp", times(2), {"bubble": lt, "weights": ge}),
    ("parallel.cp", times(2), {"activations": lt, "weights": eq}),
    ("parallel.recompute", becomes(Recompute.full), {"step": gt, "activations": lt, "weights": eq}),
    ("precision.dtype", becomes(Dtype.fp32), {"step": gt, "memory": gt}),
    ("engine", becomes(OFFLOAD), {"step": gt, "optimizer": lt}),
    ("beyond.gradients", becomes(Dtype.bf16), {"step": le, "gradients": lt, "optimizer": eq}),
    ("beyond.moments", becomes(Dtype.bf16), {"step": lt, "optimizer": lt, "gradients": eq}),
    ("beyond.products", becomes(Products.fp8), {"step": lt, "activations": lt, "weights": eq}),
    ("beyond.recompute", becomes([Module.layernorm]), {"step": gt, "activations": lt}),
    ("imbalance", becomes(1.0), {"step": lt, "activations": lt}),
    ("imbalance", becomes(2.0), {"step": gt, "activations": gt}),
    ("model.moe.router.capacity_factor", becomes(1.0), {"step": lt, "activations": lt}),
    ("model.moe.top_k", times(2), {"step": gt, "activations": gt, "weights": eq}),
    ("parallel.ep", times(0.5), {"weights": gt, "optimizer": ge}),
)
OF_EXPERTS = ("imbalance", "model.moe", "parallel.ep")


def measured(plan: PlanConfig) -> dict[str, float]:
    found: Estimate = estimate(plan)
    first = found.memory[0]
    return {
        "step": found.step.seconds, "bubble": found.step.parts["bubble"] / found.step.seconds, "days": found.days,
        "usd": found.cost.usd or 0.0, "kwh": found.cost.kwh or 0.0, "memory": found.peak_memory_bytes,
        "weights": first.weights_bytes, "gradients": first.gradients_bytes, "optimizer": first.optimizer_bytes,
        "activations": first.activations_bytes,
    }  # fmt: skip


@pytest.mark.parametrize("model", MODELS)
def test_every_single_change_moves_a_plan_the_way_it_must(model: str) -> None:
    base = plan_of(f"model={model}", *LAYOUT, *(() if model == "llama3_405b" else ("parallel.ep=8",)))
    before, wrong, tried = measured(base), [], 0
    for key, change, moves in CHANGES:
        if base.model.moe is None and key.startswith(OF_EXPERTS):
            continue
        plan = deepcopy(base)
        *parents, name = key.split(".")
        owner = reduce(getattr, parents, plan)
        setattr(owner, name, change(getattr(owner, name)))
        plan.validate()
        after, tried = measured(plan), tried + 1
        for quantity, must in moves.items():
            if not must(after[quantity], before[quantity]):
                wrong.append(f"{key}: {quantity} {before[quantity]:.6g} -> {after[quantity]:.6g}, not {must.__name__}")
    assert wrong == [] and tried >= (29 if base.model.moe is None else 34)

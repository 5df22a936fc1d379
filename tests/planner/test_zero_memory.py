"""States under engine=deepspeed against the engines that training builds, to the byte."""

from functools import cache
from typing import TYPE_CHECKING

import pytest

from gpt4moe.config.load import load_run_config
from gpt4moe.parallel.environment import Environment
from gpt4moe.parallel.layout import Layout
from gpt4moe.planner.memory import memory_per_stage
from tests.distributed.case import BASE
from tests.spawn import run_ranks

if TYPE_CHECKING:
    from gpt4moe.rehearsal.rehearsal import HeldBytes

# Of engine=deepspeed, on two ranks, on top of BASE; sizes leave padding in every group.
ZERO: dict[str, tuple[str, ...]] = {
    "dp2, bf16": ("precision=bf16",),
    "dp2, norms that do not divide": ("model.hidden_size=34", "model.head_dim=8", "model.qk_norm=true"),
    "tp2-ep2, bf16": ("parallel.tp=2", "parallel.ep=2", "precision=bf16"),
    "dp2, bf16, rates by pattern": (
        "precision=bf16",
        "optimizer.by_pattern=[{tensors:'*experts.down',weight_decay:2},{tensors:'*[01].*norm*',lr_factor:2},"
        "{tensors:'*linear*',lr_factor:3}]",
    ),
    "vision": ("+vision@model.vision=tiny", "model.vision.encoder.hidden_size=20", "parallel.pp=2"),
    "adapters, ep2, bf16": ("parallel.ep=2", "stage.lora.rank=4", "precision=bf16"),
    "pp2, tied, a dense stage": (
        "parallel.pp=2", "model.tied_embeddings=true", "model.moe.layer_pattern=[0,0,1,1]", "model.ffn_hidden_size=40",
    ),
}  # fmt: skip


def _zero_held(environment: Environment) -> dict[str, "HeldBytes"]:
    """Off the engines that training builds: DeepSpeed's do not build on the meta device."""
    from gpt4moe.model.gpt import build_model
    from gpt4moe.parallel.groups import ProcessGroups, world
    from gpt4moe.rehearsal.rank import zero_held_bytes
    from gpt4moe.training.engine_deepspeed import DeepSpeedEngine

    answers = {}
    with world(environment) as device:
        for name, overrides in ZERO.items():
            run = load_run_config([*BASE, "engine=deepspeed", *overrides])
            layout = Layout.from_config(run.parallel, environment.world_size)
            groups = ProcessGroups.create(layout, environment.rank, device, run.run.seed)
            answers[name] = zero_held_bytes(DeepSpeedEngine(build_model(run, groups), run, groups))
    return answers


@cache
def zero_held() -> list[dict[str, "HeldBytes"]]:
    return run_ranks(2, _zero_held)


@pytest.mark.parametrize("name", ZERO)
def test_states_are_what_deepspeed_holds_to_the_byte(name: str) -> None:
    run = load_run_config([*BASE, "engine=deepspeed", *ZERO[name]])
    layout = Layout.from_config(run.parallel, 2)
    planned = memory_per_stage(run, layout)
    for rank, answers in enumerate(zero_held()):
        memory, held = planned[layout.coordinate(rank)["pp"]], answers[name]
        assert (held.weights, held.gradients) == (memory.weights_bytes, memory.gradients_bytes)
        assert held.optimizer == memory.optimizer_bytes

"""Many micro-batches under bf16 weights add up in fp32."""

import dataclasses

import pytest
import torch

from gpt4moe.config.load import load_run_config
from gpt4moe.model.gpt import build_model
from gpt4moe.parallel.environment import Environment
from gpt4moe.parallel.groups import ProcessGroups, world
from gpt4moe.parallel.layout import Layout
from gpt4moe.training.build import ENGINES
from gpt4moe.training.engine import Engine
from gpt4moe.training.step import StepRunner
from gpt4moe.training.update import Action, Verdict, train_step
from tests.distributed.case import BASE, synthetic_batches
from tests.distributed.layouts import LAYOUTS, LayoutCase
from tests.spawn import run_ranks

pytestmark = pytest.mark.layouts

MICRO_BATCHES = 64


def _distances(environment: Environment, overrides: tuple[str, ...]) -> tuple[float, float]:
    """|accumulated - sum| / |sum| over this rank's gradients: as the engine accumulates, and as a bf16 sum would."""
    batch = f"training.global_batch_size={2 * MICRO_BATCHES}"
    run = load_run_config([*BASE, *overrides, batch, "precision=bf16", "model.num_layers=2"])
    with world(environment) as device:
        layout = Layout.from_config(run.parallel, environment.world_size)
        groups = ProcessGroups.create(layout, environment.rank, device, run.run.seed)
        engine = ENGINES[run.engine.kind](build_model(run, groups), run, groups)
        runner = StepRunner(run, engine, groups)
        # Every label counts: each micro-batch then has exactly 1/64 of the tokens, and scaling by it rounds nothing.
        batches = [
            dataclasses.replace(batch, loss_mask=torch.ones_like(batch.loss_mask))
            for batch in synthetic_batches(run, 1, layout.dp, groups.coordinate["dp"])
        ]
        accumulated = _gradients(runner, engine, batches)
        parts = [_gradients(runner, engine, [batch]) / len(batches) for batch in batches]
    total = torch.stack(parts).double().sum(dim=0)
    rough = torch.zeros_like(parts[0], dtype=torch.bfloat16)
    for part in parts:
        rough += part.bfloat16()
    return tuple(((value.double() - total).norm() / total.norm()).item() for value in (accumulated, rough))


def _gradients(runner: StepRunner, engine: Engine, batches: list) -> torch.Tensor:
    found: list[torch.Tensor] = []
    train_step(
        runner, 1, batches, policy=lambda numbers, run: Verdict(Action.skip),
        after_reduce=lambda: found.extend(owned.gradient.flatten().clone() for owned in engine.owned()),
    )  # fmt: skip
    return torch.cat(found)


@pytest.mark.parametrize(
    ("name", "engine"), [("single", "megatron"), ("tp2-pp2-ep2", "megatron"), ("tp2-pp2-ep2", "deepspeed")]
)
def test_64_micro_batches_in_bf16_equal_their_fp32_sum(name: str, engine: str) -> None:
    layout = LAYOUTS.get(name, LayoutCase(1, ()))
    for ours, in_bf16 in run_ranks(layout.world_size, _distances, (*layout.overrides, f"engine={engine}")):
        assert ours < 1e-6
        assert in_bf16 > 1e-3, "a bf16 sum must be visibly worse, or this test sees nothing"

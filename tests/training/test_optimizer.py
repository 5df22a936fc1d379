"""What one update does to each parameter, and the norm at a size where fp32 sums go wrong."""

import pytest
import torch

from gpt4moe.config.load import load_run_config
from gpt4moe.model.gpt import build_model
from gpt4moe.model.parameters import shards
from gpt4moe.parallel.environment import Environment
from gpt4moe.parallel.groups import ProcessGroups, world
from gpt4moe.parallel.layout import Layout
from gpt4moe.training.build import ENGINES
from gpt4moe.training.engine import Engine
from tests.spawn import run_ranks

SMALL = ("+experiment=tiny", "run.name=x", "data=mock", "model.num_layers=1", "optimizer.weight_decay=0.5")


def _engine(environment: Environment, *overrides: str) -> tuple[Engine, ProcessGroups]:
    run = load_run_config([*SMALL, *overrides])
    layout = Layout.from_config(run.parallel, environment.world_size)
    groups = ProcessGroups.create(layout, environment.rank, torch.device("cpu"), run.run.seed)
    return ENGINES[run.engine.kind](build_model(run, groups), run, groups), groups


def _after_a_step_without_gradient(environment: Environment, overrides: tuple[str, ...]) -> dict[str, float]:
    """Size of each tensor after one update of rate 0.1, over its size before."""
    with world(environment):
        engine, groups = _engine(environment, *overrides)
        before = {id(p): p.detach().norm().item() for p, _, _ in shards(engine.chunks, groups)}
        engine.zero_gradients()
        engine.chunks[0].finish_grad_sync()
        engine.reduce()
        engine.update(0.1)
        return {s.name: p.detach().norm().item() / before[id(p)] for p, s, _ in shards(engine.chunks, groups)}


@pytest.mark.parametrize(
    "overrides", [(), ("engine=deepspeed",), ("engine=deepspeed", "engine.offload_optimizer=true")]
)
def test_weight_decay_shrinks_matrices_and_leaves_norms_alone(overrides: tuple[str, ...]) -> None:
    (ratios,) = run_ranks(1, _after_a_step_without_gradient, overrides)
    for name, ratio in ratios.items():
        wanted = 1.0 if "norm" in name else 1 - 0.1 * 0.5
        assert abs(ratio - wanted) < 1e-5, name


def _norm_of_ramp(environment: Environment) -> tuple[float, float]:
    """The engine's norm and the fp64 one of gradients that fp32 sums badly: 2 million equal elements a tensor."""
    with world(environment):
        engine, _ = _engine(environment, "optimizer.clip_norm=0")
        engine.zero_gradients()
        engine.chunks[0].finish_grad_sync()
        engine.reduce()
        total = 0.0
        for owned in engine.owned():
            owned.gradient.fill_(0.1)
            total += owned.gradient.double().square().sum().item()
        return engine.norm(), total**0.5


def test_the_norm_of_large_tensors_is_exact_to_a_millionth() -> None:
    ((norm, exact),) = run_ranks(1, _norm_of_ramp)
    assert abs(norm / exact - 1) < 1e-7

"""The verdict of a training step: a skipped update leaves everything as it was, a stop raises on every rank."""

from typing import Any

import numpy as np
import pytest
import torch

from gpt4moe.config.load import load_run_config
from gpt4moe.config.run import RunConfig
from gpt4moe.errors import DivergenceError
from gpt4moe.model.gpt import build_model
from gpt4moe.model.parameters import buffers
from gpt4moe.moe.statistics import tokens_of_experts
from gpt4moe.parallel.environment import Environment
from gpt4moe.parallel.groups import ProcessGroups, world
from gpt4moe.parallel.layout import Layout
from gpt4moe.training.build import ENGINES
from gpt4moe.training.engine import Engine
from gpt4moe.training.step import StepRunner
from gpt4moe.training.update import GO_ON, Action, StepNumbers, Verdict, train_step
from tests.distributed.case import BASE, synthetic_batches
from tests.spawn import run_ranks

pytestmark = pytest.mark.layouts

# A router with a bias and with the load of the step before, so that there are buffers to move.
ROUTER = (
    "router@model.moe.router=sigmoid_bias", "model.moe.router.load_balancing_coefficient=0.1",
    "model.moe.router.load_balancing_scope=global_batch", "schedule=cosine", "schedule.total_steps=10",
)  # fmt: skip
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one process": (1, ()),
    "one process, deepspeed": (1, ("engine=deepspeed",)),
    "tp2 x pp2 x ep2": (4, ("parallel.tp=2", "parallel.pp=2", "parallel.ep=2")),
    "dp2, deepspeed, bf16": (2, ("engine=deepspeed", "parallel.ep=2", "precision=bf16")),
}
State = list[np.ndarray]


def skip_step_2(numbers: StepNumbers, run: RunConfig) -> Verdict:
    return Verdict(Action.skip, "for the test") if numbers.step == 2 else GO_ON


def stop_at_once(numbers: StepNumbers, run: RunConfig) -> Verdict:
    return Verdict(Action.stop, f"Step {numbers.step} was to stop.", "Do not test it.")


def _state(engine: Engine, groups: ProcessGroups) -> State:
    """Copies of this rank's weights, masters, moments and routers' buffers."""
    found: list[torch.Tensor] = [parameter for chunk in engine.chunks for parameter in chunk.parameters()]
    for owned in engine.owned():
        found += [owned.master, *owned.states.values()]
    found += [buffer for buffer, _ in buffers(engine.chunks, groups)]
    return [tensor.detach().float().cpu().numpy().copy() for tensor in found]


def _runner(environment: Environment, overrides: tuple[str, ...], device: torch.device) -> StepRunner:
    run = load_run_config([*BASE, *ROUTER, *overrides])
    layout = Layout.from_config(run.parallel, environment.world_size)
    groups = ProcessGroups.create(layout, environment.rank, device, run.run.seed)
    return StepRunner(run, ENGINES[run.engine.kind](build_model(run, groups), run, groups), groups)


def _batches(runner: StepRunner, step: int) -> list[Any]:
    return synthetic_batches(runner.run, step, runner.groups.layout.dp, runner.groups.coordinate["dp"])


def _walks(environment: Environment, overrides: tuple[str, ...]) -> dict[str, Any]:
    """Steps 1, 2 (skipped), 3; and in a second run from the same weights steps 1, 3."""
    states: dict[str, Any] = {}
    with world(environment) as device:
        for name, steps in (("skipped", (1, 2, 3)), ("left out", (1, 3))):
            runner = _runner(environment, overrides, device)
            for step in steps:
                done = train_step(runner, step, _batches(runner, step), policy=skip_step_2)
                states[f"{name} {step}"] = _state(runner.engine, runner.groups)
                states[f"{name} {step} done"] = (done.is_updated, done.result.loss, done.grad_norm, done.learning_rate)
    return states


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_skipped_update_moves_nothing_and_the_next_step_is_as_if_it_had_not_been(name: str) -> None:
    world_size, overrides = LAYOUTS[name]
    for states in run_ranks(world_size, _walks, overrides):
        assert [states[f"skipped {step} done"][0] for step in (1, 2, 3)] == [True, False, True]
        for before, after in (("skipped 1", "skipped 2"), ("left out 3", "skipped 3")):
            assert len(states[before]) == len(states[after])
            assert all(map(np.array_equal, states[before], states[after])), (before, after)
        assert not all(map(np.array_equal, states["skipped 2"], states["skipped 3"]))
        assert states["skipped 3 done"] == states["left out 3 done"]


@pytest.mark.parametrize("name", ["one process", "tp2 x pp2 x ep2"])
def test_a_step_moves_the_routers_buffers_by_the_load_of_the_global_batch(name: str) -> None:
    world_size, overrides = LAYOUTS[name]
    moved = [layer for answer in run_ranks(world_size, _moved_buffers, overrides) for layer in answer]
    assert {layer for layer, *_ in moved} == {0, 1, 2, 3}
    for _, load, rate, bias, load_share in moved:
        assert load.max() > load.mean() > load.min()
        np.testing.assert_array_equal(bias, np.float32(rate) * np.sign(load.mean() - load).astype(np.float32))
        np.testing.assert_allclose(load_share, load / load.sum(), rtol=1e-6)


def _moved_buffers(environment: Environment, overrides: tuple[str, ...]) -> list[tuple[Any, ...]]:
    """After step 1, of each MoE layer of this rank: index, tokens of the experts, rate, bias, load share."""
    with world(environment) as device:
        runner = _runner(environment, overrides, device)
        routing = train_step(runner, 1, _batches(runner, 1)).result.routing.numpy()
        return [
            (layer, tokens_of_experts(routing[layer]), router.bias_update_rate,
             router.bias.numpy().copy(), router.load_share.numpy().copy())
            for layer, router in ((layer, module.router) for layer, module in runner.moe_layers.items())
        ]  # fmt: skip


def test_a_policy_sees_the_same_numbers_on_every_rank_and_a_stop_leaves_the_weights() -> None:
    for cause, is_untouched in run_ranks(2, _stopped, ("parallel.pp=2",)):
        assert (cause, is_untouched) == ("Step 1 was to stop.", True)


def _stopped(environment: Environment, overrides: tuple[str, ...]) -> tuple[str, bool]:
    with world(environment) as device:
        runner = _runner(environment, overrides, device)
        before = _state(runner.engine, runner.groups)
        with pytest.raises(DivergenceError) as raised:
            train_step(runner, 1, _batches(runner, 1), policy=stop_at_once)
        return raised.value.cause, all(map(np.array_equal, before, _state(runner.engine, runner.groups)))

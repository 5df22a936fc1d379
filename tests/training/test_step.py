"""A whole step's gradients are those of the stated objective, to the last factor, under both engines in one process.

    sum over the global batch of mask * cross entropy / sum of masks
    + mean over micro-batches of the layers' balance and z-losses, each times its coefficient

The reference is torch's autograd of these two lines, written here from the model's logits and the routers' logits.
Other tests compare layouts with one process, so a factor that is wrong everywhere alike would pass them.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from gpt4moe.config.load import load_run_config
from gpt4moe.config.run import RunConfig
from gpt4moe.model.gpt import build_model
from gpt4moe.model.parameters import shards
from gpt4moe.moe import layer, losses
from gpt4moe.moe.routers.base import Router
from gpt4moe.objectives.next_token import NextToken
from gpt4moe.parallel.environment import Environment
from gpt4moe.parallel.groups import ProcessGroups, world
from gpt4moe.parallel.layout import Layout
from gpt4moe.training.build import ENGINES
from gpt4moe.training.engine_deepspeed import DeepSpeedEngine
from gpt4moe.training.engine_megatron import MegatronEngine
from gpt4moe.training.step import StepRunner
from gpt4moe.training.update import Action, Verdict, train_step
from tests.distributed.case import BASE, synthetic_batches
from tests.spawn import run_ranks

# Six micro-batches with uneven masks; a dense layer, then three with experts.
MODEL = ("model.moe.layer_pattern=[0,1,1,1]", "model.ffn_hidden_size=48")
ENGINE_NAMES = ("megatron", "deepspeed")
Gradients = dict[str, Tensor]


def stated(run: RunConfig, groups: ProcessGroups) -> Gradients:
    """torch.autograd of the objective, for every parameter."""
    moe, (chunk,) = run.model.moe, build_model(run, groups)
    assert moe is not None
    seen: list[Any] = []
    for module in chunk.modules():
        if isinstance(module, Router):
            module.register_forward_hook(lambda router, args, routing: seen.append(routing))
        if isinstance(module, layer.ExpertParallelMLP):
            module.auxiliary_scale = 0.0  # its own losses add nothing to the backward pass: ours do
    batches = synthetic_batches(run, 1, 1, 0)
    num_tokens = sum(batch.loss_mask.sum() for batch in batches)
    total = torch.zeros(())
    for batch in batches:
        seen.clear()
        logits = chunk(batch.tokens, batch.position_ids, None)
        entropy = functional.cross_entropy(logits.transpose(1, 2), batch.labels, reduction="none")
        total = total + (batch.loss_mask * entropy).sum() / num_tokens
        for routing in seen:
            probability = routing.logits.softmax(dim=-1)
            chosen = functional.one_hot(routing.expert_index, moe.num_experts).sum(dim=1).float()
            balance = moe.num_experts * (chosen.mean(dim=0) / moe.top_k * probability.mean(dim=0)).sum()
            z_loss = routing.logits.logsumexp(dim=-1).square().mean()
            settings = moe.router
            auxiliary = settings.load_balancing_coefficient * balance + settings.z_loss_coefficient * z_loss
            total = total + auxiliary / len(batches)
        assert len(seen) == 3
    named = {shard.name: parameter for parameter, shard, _ in shards([chunk], groups)}
    return dict(zip(named, torch.autograd.grad(total, list(named.values())), strict=True))


def stepped(run: RunConfig, groups: ProcessGroups) -> tuple[Gradients, float]:
    """The engine's reduced gradients of a training step, and its norm of them."""
    engine = ENGINES[run.engine.kind](build_model(run, groups), run, groups)
    names = {id(parameter): shard.name for parameter, shard, _ in shards(engine.chunks, groups)}
    found: Gradients = {}

    def collect() -> None:
        for owned in engine.owned():
            whole = found.setdefault(names[id(owned.parameter)], torch.full_like(owned.parameter.detach(), torch.nan))
            whole.view(-1)[owned.start : owned.end] = owned.gradient

    done = train_step(
        StepRunner(run, engine, groups), 1, synthetic_batches(run, 1, 1, 0), after_reduce=collect,
        policy=lambda numbers, run: Verdict(Action.skip),
    )  # fmt: skip
    return found, done.grad_norm


def times(owner: Any, name: str, factor: float) -> AbstractContextManager[Any]:
    """The result of owner.name times `factor`."""
    original = getattr(owner, name)
    return patch.object(owner, name, lambda *args, **kwargs: original(*args, **kwargs) * factor)


@contextmanager
def losses_times(factor: float) -> Iterator[None]:
    original = NextToken.losses

    def scaled(self: NextToken, output: Tensor, batch: Any) -> Any:
        return original(self, output * factor, batch)

    with patch.object(NextToken, "losses", scaled):
        yield


@contextmanager
def attached_times(factor: float) -> Iterator[None]:
    original = layer.AttachLoss

    class Scaled:
        @staticmethod
        def apply(output: Tensor, loss: Tensor, scale: float) -> Any:
            return original.apply(output, loss, scale * factor)

    with patch.object(layer, "AttachLoss", Scaled):
        yield


def reduced_times(engine: Any, only: Callable[[Any], bool]) -> Callable[[float], AbstractContextManager[Any]]:
    """The reduced gradients of some parameters times a factor."""
    original = engine.reduce

    def plant(factor: float) -> AbstractContextManager[Any]:
        def reduce(self: Any) -> None:
            original(self)
            for owned in self.owned():
                owned.gradient.mul_(factor if only(owned.parameter) else 1.0)

        return patch.object(engine, "reduce", reduce)

    return plant


PLANTS: dict[str, Callable[[float], AbstractContextManager[Any]]] = {
    "the losses": losses_times,
    "the token count": lambda factor: times(NextToken, "num_tokens", factor),
    "all auxiliary losses": attached_times,
    "the balance loss": lambda factor: times(losses, "load_balancing_loss", factor),
    "the z-loss": lambda factor: times(losses, "z_loss_terms", factor),
    "gradients of megatron": reduced_times(MegatronEngine, lambda parameter: True),
    "gradients of experts, deepspeed": reduced_times(
        DeepSpeedEngine, lambda parameter: not getattr(parameter, "allreduce", True)
    ),
}


def distances(environment: Environment) -> dict[str, dict[str, float]]:
    """Case -> parameter (and the norm) -> how far the step is from the stated objective, relative."""
    answers = {}
    with world(environment) as device:
        groups = ProcessGroups.create(Layout.from_config(load_run_config(list(BASE)).parallel, 1), 0, device, 1234)
        want = stated(load_run_config([*BASE, *MODEL]), groups)
        norm = torch.cat([gradient.flatten() for gradient in want.values()]).double().norm()
        cases = {(engine, "nothing", 1.0): nullcontext() for engine in ENGINE_NAMES}
        for index, (name, plant) in enumerate(PLANTS.items()):
            factor = (2.0, 0.5)[index % 2]  # both on every row pass too, at twice the time
            cases["deepspeed" if "deepspeed" in name else "megatron", name, factor] = plant(factor)
        for (engine, name, factor), planted in cases.items():
            run = load_run_config([*BASE, *MODEL, f"engine={engine}"])
            with planted:
                got, got_norm = stepped(run, groups)
            assert got.keys() == want.keys()
            far = {key: float((got[key] - want[key]).norm() / want[key].norm()) for key in want}
            answers[f"{engine}, {name} x {factor:g}"] = far | {"norm": abs(got_norm / float(norm) - 1)}
    return answers


@cache
def measured() -> dict[str, dict[str, float]]:
    return run_ranks(1, distances)[0]


@pytest.mark.parametrize("engine", ENGINE_NAMES)
def test_gradients_of_a_step_are_those_of_the_stated_objective(engine: str) -> None:
    for name, distance in measured()[f"{engine}, nothing x 1"].items():
        assert distance <= 1e-5, name  # fp32 sums in another order


def test_a_factor_of_two_or_a_half_anywhere_in_the_step_is_seen() -> None:
    planted = {case: far for case, far in measured().items() if "nothing" not in case}
    assert len(planted) == len(PLANTS)
    for case, far in planted.items():
        assert max(far.values()) > 1e-3, case

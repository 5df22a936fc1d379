"""A second objective, written here alone, trains on every layout as in one process; a stage chooses the objective.

It restores noised tokens: the model reads tokens of which some were replaced, and only those count, each by the reward
of its sequence. So the forward call, the token count, the losses and what is logged all differ from next-token
prediction, and batches carry three tensors more.
"""

import dataclasses
from functools import cache
from math import prod
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gpt4moe.config.load import load_run_config
from gpt4moe.config.training import StageKind
from gpt4moe.data.batch import Batch, ExtraTensor
from gpt4moe.errors import ConfigError
from gpt4moe.model.gpt import build_model
from gpt4moe.model.parameters import shards
from gpt4moe.objectives.objective import BatchLosses
from gpt4moe.objectives.stages import OBJECTIVES
from gpt4moe.parallel.environment import Environment
from gpt4moe.parallel.groups import ProcessGroups, world
from gpt4moe.parallel.layout import Layout
from gpt4moe.parallel.shard import flat_rectangles
from gpt4moe.training.build import ENGINES
from gpt4moe.training.engine import Engine
from gpt4moe.training.step import StepRunner
from gpt4moe.training.update import train_step
from tests.distributed.case import BASE, synthetic_batches
from tests.distributed.test_gradients import GRADIENT, NORM, WEIGHT, distance
from tests.spawn import run_ranks

RATE, STEPS = 0.05, 2
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "tp2-pp2": (4, ("parallel.tp=2", "parallel.pp=2")),
    "cp2, deepspeed": (2, ("parallel.cp=2", "engine=deepspeed")),
}
Tensors = dict[str, np.ndarray]


class Restore:
    """sum over noised tokens of reward * (cross entropy + its square / 10), over their number."""

    logged_names = ("reward", "squared")

    def num_tokens(self, batch: Batch) -> Tensor:
        return batch.extra["is_noised"].value.sum(dtype=torch.float64)

    def arguments(self, batch: Batch) -> dict[str, Any]:
        return {
            "input_ids": batch.extra["noised"].value, "position_ids": batch.position_ids.flip(0),
            "attention_mask": None, "labels": batch.tokens,
        }  # fmt: skip

    def losses(self, output: Tensor, batch: Batch) -> BatchLosses:
        entropy, weight = output.float(), batch.extra["is_noised"].value.t()
        reward = batch.extra["reward"].value.unsqueeze(1)
        losses = weight * reward * (entropy + entropy**2 / 10)
        logged = {"reward": (weight * reward).sum(), "squared": (weight * entropy.detach() ** 2).sum()}
        return BatchLosses(losses=losses, weights=weight, logged=logged)


def noised(batch: Batch, index: int) -> Batch:
    """Some tokens replaced; each sequence of another source."""
    generator = torch.Generator().manual_seed(index)
    is_noised = (torch.rand(batch.tokens.shape, generator=generator) < 0.1 + 0.1 * index).float()
    return dataclasses.replace(
        batch, source_index=torch.arange(len(batch.tokens)),
        extra={
            "noised": ExtraTensor(batch.tokens.masked_fill(is_noised.bool(), 0), sequence_dim=1),
            "is_noised": ExtraTensor(is_noised.t().contiguous(), sequence_dim=0),
            "reward": ExtraTensor(1 + torch.rand(len(batch.tokens), generator=generator)),
        },
    )  # fmt: skip


def trained(environment: Environment, overrides: tuple[str, ...]) -> dict[str, Any]:
    """What a rank knows after some steps of clipped plain descent."""
    run = load_run_config([*BASE, *overrides])
    answer: dict[str, Any] = {"numbers": [], "sources": [], "gradients": []}
    with world(environment) as device:
        layout = Layout.from_config(run.parallel, environment.world_size)
        groups = ProcessGroups.create(layout, environment.rank, device, run.run.seed)
        engine = ENGINES[run.engine.kind](build_model(run, groups), run, groups)
        runner = StepRunner(run, engine, groups, num_sources=2, objective=Restore())

        @torch.no_grad()
        def descend(_: float) -> None:
            for owned in engine.owned():
                owned.master.sub_(owned.gradient, alpha=RATE)
            engine.finish_load(1)

        for step in range(1, STEPS + 1):
            batches = [noised(batch, index) for index, batch in enumerate(synthetic_batches(run, step, 1, 0))]
            done = train_step(
                runner, step, batches, update=descend,
                after_reduce=lambda: answer["gradients"].append(_pieces(engine, groups, "gradient")),
            )  # fmt: skip
            answer["numbers"].append([done.result.loss, done.grad_norm, *done.result.logged.values()])
            answer["sources"].append(done.result.sources.numpy())
        answer["weights"] = _pieces(engine, groups, "master")
    return answer


def _pieces(engine: Engine, groups: ProcessGroups, what: str) -> list[tuple[Any, ...]]:
    """(name, shape, offset, values) of everything that this rank owns and writes."""
    boxes = {id(parameter): shard for parameter, shard, _ in shards(engine.chunks, groups)}
    found = []
    for owned in engine.owned():
        shard = boxes[id(owned.parameter)]
        values = getattr(owned, what).detach().numpy()
        for part in flat_rectangles(owned.start, owned.end, shard.shape) if shard.is_writer else ():
            box = values[part.start - owned.start :][: prod(part.shape)].reshape(part.shape).copy()
            offset = tuple(a + b for a, b in zip(shard.offset, part.offset, strict=True))
            found.append((shard.name, shard.global_shape, offset, box))
    return found


def assembled(parts: list[list[tuple[Any, ...]]]) -> Tensors:
    whole: Tensors = {}
    for name, shape, offset, values in (piece for part in parts for piece in part):
        where = tuple(slice(first, first + size) for first, size in zip(offset, values.shape, strict=True))
        whole.setdefault(name, np.full(shape, np.nan))[where] = values
    return whole


@cache
def runs(world_size: int, overrides: tuple[str, ...]) -> dict[str, Any]:
    answers = run_ranks(world_size, trained, overrides)
    assert all(answer["numbers"] == answers[0]["numbers"] for answer in answers)
    gradients = [assembled([answer["gradients"][step] for answer in answers]) for step in range(STEPS)]
    return answers[0] | {"gradients": gradients, "weights": assembled([answer["weights"] for answer in answers])}


@pytest.mark.layouts
@pytest.mark.parametrize("name", LAYOUTS)
def test_another_objective_trains_as_in_one_process(name: str) -> None:
    got, want = runs(*LAYOUTS[name]), runs(1, ())
    np.testing.assert_allclose(got["numbers"], want["numbers"], rtol=NORM, equal_nan=False)
    np.testing.assert_allclose(got["sources"], want["sources"], rtol=NORM, equal_nan=False)
    for ours, theirs in zip(got["gradients"], want["gradients"], strict=True):
        assert ours.keys() == theirs.keys()
        assert all(distance(ours[key], value) <= GRADIENT for key, value in theirs.items())
    assert all(distance(got["weights"][key], value) <= WEIGHT for key, value in want["weights"].items())


@pytest.mark.layouts
def test_what_is_logged_and_the_sources_losses_are_means_of_the_global_batch() -> None:
    want = runs(1, ())
    run = load_run_config(list(BASE))
    batches = [noised(batch, index) for index, batch in enumerate(synthetic_batches(run, 1, 1, 0))]
    noise = [(batch.extra["is_noised"].value, batch.extra["reward"].value) for batch in batches]
    tokens = sum(is_noised.sum() for is_noised, _ in noise)
    rewards = sum((is_noised * reward).sum() for is_noised, reward in noise)
    loss, _, reward, _ = want["numbers"][0]
    assert reward == pytest.approx(float(rewards / tokens))
    losses, counts = want["sources"][0]
    assert counts.sum() == tokens and losses.sum() / tokens == pytest.approx(loss)


def test_every_stage_has_an_objective_and_an_unknown_stage_is_refused() -> None:
    assert OBJECTIVES.keys() == set(StageKind)
    for override in ("stage=rhyme", "stage.kind=rhyme"):
        with pytest.raises(ConfigError, match="pretrain"):
            load_run_config(["+experiment=tiny", "run.name=x", override])

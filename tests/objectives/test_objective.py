"""A second objective, written here alone, trains on every layout as in one process; a stage chooses the objective.

It restores noised tokens: the model reads tokens of which some were replaced, and only those count, each by the reward
of its sequence. So the forward call, the token count, the losses and what is logged all differ from next-token
prediction, and batches carry three tensors more, which it makes itself (`prepare`).
"""

import dataclasses
from functools import cache
from math import prod
from typing import Any, NamedTuple, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from gpt4moe.config.load import load_run_config
from gpt4moe.config.stage import StageKind
from gpt4moe.data.batch import Batch, ExtraTensor
from gpt4moe.data.loader import build_data
from gpt4moe.errors import ConfigError
from gpt4moe.model.gpt import build_model
from gpt4moe.model.parameters import shards
from gpt4moe.objectives.next_token import NextToken
from gpt4moe.objectives.objective import BatchLosses, Objective
from gpt4moe.objectives.stages import OBJECTIVES
from gpt4moe.parallel.environment import Environment
from gpt4moe.parallel.groups import ProcessGroups, world
from gpt4moe.parallel.layout import Layout
from gpt4moe.parallel.shard import flat_rectangles
from gpt4moe.runlog.metrics import Metric
from gpt4moe.runlog.step_metrics import OBJECTIVE_METRICS
from gpt4moe.training.build import ENGINES
from gpt4moe.training.callbacks.measurements import held_out_batches
from gpt4moe.training.engine import Engine
from gpt4moe.training.run_folder import RunFolder
from gpt4moe.training.state import TrainingContext
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
DECLARED = {name: Metric(unit="", meaning="of this test") for name in ("reward", "squared", "sources", "num_noised")}


class Restore:
    """sum over noised tokens of reward * (cross entropy + its square / 10), over their number."""

    logged_names: tuple[str, ...] = ("reward", "squared")

    def prepare(self, batch: Batch, seed: int) -> Batch:
        """Some tokens replaced, of labels that count; each sequence of another source."""
        draws = [torch.Generator().manual_seed(1000 * seed + max(int(sample), 0)) for sample in batch.samples]
        share = torch.stack([torch.rand(batch.tokens.shape[1], generator=draw) for draw in draws])
        is_noised = (share < 0.2 + 0.1 * (batch.samples % 7).unsqueeze(1)) * batch.loss_mask
        return dataclasses.replace(
            batch, source_index=torch.arange(len(batch.tokens)),
            extra={
                "noised": ExtraTensor(batch.tokens.masked_fill(is_noised.bool(), 0), sequence_dim=1),
                "is_noised": ExtraTensor(is_noised.t().contiguous(), sequence_dim=0),
                "reward": ExtraTensor(1 + torch.cat([torch.rand(1, generator=draw) for draw in draws])),
            },
        )  # fmt: skip

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


def trained(environment: Environment, overrides: tuple[str, ...]) -> dict[str, Any]:
    """What a rank knows after some steps of clipped plain descent."""
    OBJECTIVE_METRICS.update(DECLARED)
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
            done = train_step(
                runner, step, synthetic_batches(run, step, 1, 0), update=descend,
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
    batches = [Restore().prepare(batch, run.run.seed) for batch in synthetic_batches(run, 1, 1, 0)]
    noise = [(batch.extra["is_noised"].value, batch.extra["reward"].value) for batch in batches]
    tokens = sum(is_noised.sum() for is_noised, _ in noise)
    rewards = sum((is_noised * reward).sum() for is_noised, reward in noise)
    loss, _, reward, _ = want["numbers"][0]
    assert reward == pytest.approx(float(rewards / tokens))
    losses, counts = want["sources"][0]
    assert counts.sum() == tokens and losses.sum() / tokens == pytest.approx(loss)


EVALUATED = 5
"""Of micro-batches of 2: one process adds one masked sample, two data-parallel ranks add three."""


class Counted(Restore):
    """Logs names that the step uses itself, inside."""

    logged_names = ("sources", "num_noised")

    def losses(self, output: Tensor, batch: Batch) -> BatchLosses:
        found, is_noised = super().losses(output, batch), batch.extra["is_noised"].value
        logged = {"sources": 2 * is_noised.sum(), "num_noised": is_noised.sum()}
        return dataclasses.replace(found, logged=logged)


class Light(NextToken):
    """Next-token prediction in another unit, in which a whole batch weighs less than one token."""

    unit = 2.0**-12

    def num_tokens(self, batch: Batch) -> Tensor:
        return self.unit * super().num_tokens(batch)

    def losses(self, output: Tensor, batch: Batch) -> BatchLosses:
        found = super().losses(output, batch)
        return dataclasses.replace(found, losses=self.unit * found.losses, weights=self.unit * found.weights)


class Evaluated(NamedTuple):
    """What a rank knows after an evaluation; plain numbers, which travel by pipe."""

    loss: float
    num_tokens: float
    logged: dict[str, float]
    sources: list[float]
    """Losses and weights, summed over sources."""


def evaluated(environment: Environment, objectives: list[Objective], samples: int) -> list[Evaluated]:
    OBJECTIVE_METRICS.update(DECLARED)
    run = load_run_config([*BASE, f"training.eval_samples={samples}"])
    with world(environment) as device:
        groups = ProcessGroups.create(
            Layout.from_config(run.parallel, environment.world_size), environment.rank, device, run.run.seed
        )
        engine = ENGINES[run.engine.kind](build_model(run, groups), run, groups)
        found = []
        for objective in objectives:
            runner = StepRunner(run, engine, groups, num_sources=2, objective=objective)
            context = TrainingContext(
                run=run, groups=groups, folder=RunFolder.of(run), data=build_data(run), engine=engine, runner=runner
            )
            result = runner.evaluate(held_out_batches(context))
            found.append(Evaluated(result.loss, result.num_tokens, result.logged, result.sources.sum(dim=1).tolist()))
        return found


@pytest.mark.layouts
def test_an_evaluation_counts_its_samples_alone_whatever_dp_is() -> None:
    ((want,),) = run_ranks(1, evaluated, [Counted()], EVALUATED)
    others = run_ranks(2, evaluated, [Counted()], EVALUATED)
    run = load_run_config(list(BASE))
    samples = build_data(run).validation.micro_batches(0, global_batch_size=6, micro_batch_size=1, dp=1, dp_index=0)
    counts = [float(Counted().num_tokens(Counted().prepare(batch, run.run.seed))) for batch in samples]
    assert want.num_tokens == sum(counts[:EVALUATED]) and min(counts) > 0
    assert want.logged == {"sources": 2.0, "num_noised": 1.0}
    for (got,) in others:
        assert got.num_tokens == want.num_tokens and got.logged == want.logged
        assert got.loss == pytest.approx(want.loss, rel=NORM)
        assert got.sources == pytest.approx(want.sources, rel=NORM)


@pytest.mark.layouts
def test_a_token_count_need_not_be_an_integer() -> None:
    ((plain, light),) = run_ranks(1, evaluated, [NextToken(), Light()], EVALUATED)
    assert 0 < light.num_tokens == Light.unit * plain.num_tokens < 1
    assert light.loss == plain.loss  # bitwise: the unit is a power of two
    assert plain.num_tokens == int(plain.num_tokens) > 1


@pytest.mark.parametrize(
    ("name", "cause", "cure"),
    [
        *((own, "a metric that the run writes itself", "another name") for own in ("loss", "grad_norm", "loss/code",
          "router_entropy", "step_seconds", "eval_loss", "cost_usd")),
        ("rhyme", "'rhyme', which no metric declares", "Declare it in OBJECTIVE_METRICS"),
    ],
)  # fmt: skip
def test_a_name_that_an_objective_must_not_log_is_refused_before_anything_is_built(
    name: str, cause: str, cure: str
) -> None:
    objective, unbuilt = Restore(), cast(Any, None)
    objective.logged_names = (name,)
    with pytest.raises(ConfigError, match=cause) as caught:
        StepRunner(load_run_config(list(BASE)), unbuilt, unbuilt, objective=objective)
    assert cure in caught.value.cure


def test_every_stage_has_an_objective_and_an_unknown_stage_is_refused() -> None:
    assert OBJECTIVES.keys() == set(StageKind)
    for override in ("stage=rhyme", "stage.kind=rhyme"):
        with pytest.raises(ConfigError, match="pretrain"):
            load_run_config(["+experiment=tiny", "run.name=x", override])

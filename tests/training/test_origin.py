"""A step whose numbers are not finite says where they came from: weight, layer, micro-batch, expert, rank."""

from collections.abc import Callable
from math import nan
from typing import Any

import pytest

from gpt4moe.errors import DivergenceError
from gpt4moe.model.parameters import decoder_layers, shards
from gpt4moe.parallel.environment import Environment
from gpt4moe.parallel.groups import world
from gpt4moe.training.engine import OwnedRange
from gpt4moe.training.step import StepRunner
from gpt4moe.training.update import train_step
from tests.spawn import run_ranks
from tests.training.test_update import LAYOUTS, _batches, _runner

pytestmark = pytest.mark.layouts


def _owned(runner: StepRunner, name: str) -> list[OwnedRange]:
    """Of this rank."""
    named = {id(parameter): shard.name for parameter, shard, _ in shards(runner.engine.chunks, runner.groups)}
    return [owned for owned in runner.engine.owned() if named[id(owned.parameter)] == name]


def _cause(runner: StepRunner, batches: list[Any], after_reduce: Callable[[], None] | None = None) -> str:
    with pytest.raises(DivergenceError) as caught:
        train_step(runner, 1, batches, after_reduce=after_reduce)
    return caught.value.cause


def _told(environment: Environment, overrides: tuple[str, ...]) -> dict[str, str]:
    """What the causes of four faults say. The last rank has the fault of a weight or a gradient alone."""
    with world(environment) as device:
        runner = _runner(environment, overrides, device)
        groups, batches = runner.groups, _batches(runner, 1)
        is_last = groups.rank == groups.layout.world_size - 1
        first = train_step(runner, 1, batches)
        layers = {layer: it for chunk in runner.chunks for layer, it in decoder_layers(chunk).items()}
        depth = max(runner.run.model.num_layers - 1, 0)
        seen = [0]

        def spoil(module: Any, inputs: Any, output: Any) -> Any:
            """Micro-batch 1 of this rank, each time."""
            seen[0] += 1
            hidden, *rest = output
            return (hidden * nan if (seen[0] - 1) % len(batches) == 1 else hidden, *rest)

        hook = layers[depth].register_forward_hook(spoil) if depth in layers and is_last else None
        told = {"forward": _cause(runner, batches)}
        if hook is not None:
            hook.remove()

        def spoil_gradient() -> None:
            for owned in _owned(runner, f"decoder.layers.{depth}.mlp.experts.down") if is_last else ():
                owned.gradient.detach()[-1] = nan

        told["gradient"] = _cause(runner, batches, spoil_gradient)
        for owned in _owned(runner, f"decoder.layers.{depth}.mlp.experts.down") if is_last else ():
            owned.master.detach()[-1] = nan
        runner.engine.finish_load(1)
        told["weight"] = _cause(runner, batches)
        told["loss before"] = str(first.result.loss)
        return told


@pytest.mark.parametrize("name", ["tp2 x pp2 x ep2", "one process, deepspeed"])
def test_the_cause_names_layer_micro_batch_expert_and_rank(name: str) -> None:
    ranks, overrides = LAYOUTS[name]
    first, *others = run_ranks(ranks, _told, overrides)
    last = ranks - 1
    assert all(other == first for other in others), "the same on every rank"
    assert "The first output that is not finite is that of layer" in first["forward"]
    assert f"in micro-batch 1 on rank {last}, sample" in first["forward"]
    assert "The forward pass is finite; of the gradients, that of decoder.layers." in first["gradient"]
    assert f"experts.down (expert 3) is not, on rank {last}" in first["gradient"]
    assert f"mlp.experts.down (expert 3) is not finite on rank {last}." in first["weight"]

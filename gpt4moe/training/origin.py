"""Where a number that is not finite came from, as far as it can be told. For a step that went wrong alone.

    a trained weight that is not finite       -> its name and rank
    else the forward pass once more, watched  -> the first layer whose output is not finite: micro-batch, rank, samples
    else, and the loss was finite             -> the last layer with such a gradient: tensor, experts, rank

A number that is not finite spreads: in the forward pass to all later layers of its micro-batch, in the backward pass to
all earlier ones. So in one the first layer counts, in the other the last. Every rank calls this together, because the
numbers of a step are the same on every rank. An ordinary step pays nothing.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import isfinite, prod
from typing import Any

import torch
from torch import Tensor

from gpt4moe.data.batch import Batch
from gpt4moe.model.parameters import decoder_layers, shards
from gpt4moe.parallel.agreement import all_reduce_max, broadcast_text
from gpt4moe.parallel.groups import ProcessGroups
from gpt4moe.parallel.shard import Shard
from gpt4moe.training.step import StepRunner

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
_NONE = 1 << 40
_NAMED = 8

Found = tuple[int, str]
"""How far in the model, and a sentence. Of several the lowest counts."""


def origin(runner: StepRunner, batches: Sequence[Batch], loss: float) -> str:
    """A sentence, the same on every rank. Collective.

    Args:
        batches, loss: of the step that went wrong; its reduced gradients are still in the engine.
    """
    told = _lowest(_weights(runner), runner.groups) or _lowest(_outputs(runner, batches), runner.groups)
    if told or not isfinite(loss):
        return told or "The forward pass, done once more, is finite: suspect the hardware."
    return _lowest(_gradients(runner), runner.groups)


def _lowest(found: list[Found], groups: ProcessGroups) -> str:
    """The sentence of the lowest over all ranks; empty: there is none. Collective."""
    place, text = min(found, default=(_NONE, ""))
    ranks = groups.layout.world_size
    (negative,) = all_reduce_max([-(place * ranks + groups.rank)], groups)
    place, rank = divmod(-negative, ranks)
    return "" if place == _NONE else broadcast_text(text, groups, source=rank)


def _weights(runner: StepRunner) -> list[Found]:
    return [
        (
            _depth(shard.name, runner),
            f"{shard.name}{_experts(shard, where)} is not finite on rank {runner.groups.rank}.",
        )
        for shard, where in _spoilt(runner, lambda owned: owned.master)
    ]


def _gradients(runner: StepRunner) -> list[Found]:
    """Of the last layer first: the backward pass comes to it first."""
    return [
        (
            runner.run.model.num_layers + 1 - _depth(shard.name, runner),
            f"The forward pass is finite; of the gradients, that of {shard.name}{_experts(shard, where)} is not, on "
            f"rank {runner.groups.rank}, the last in the model.",
        )
        for shard, where in _spoilt(runner, lambda owned: owned.gradient)
    ]


def _depth(name: str, runner: StepRunner) -> int:
    """0: before the layers; n + 1: layer n; then what stands behind them."""
    layer = _LAYER.match(name)
    if layer:
        return int(layer.group(1)) + 1
    return 0 if "embedding" in name else runner.run.model.num_layers + 1


def _spoilt(runner: StepRunner, values: Any) -> Iterator[tuple[Shard, Tensor]]:
    """The shards with a value that is not finite, of what this rank's optimizer owns, and where in the shard, flat."""
    places = {id(parameter): shard for parameter, shard, _ in shards(runner.engine.chunks, runner.groups)}
    for owned in runner.engine.owned():
        where = (~torch.isfinite(values(owned))).nonzero().flatten() + owned.start
        if len(where):
            yield places[id(owned.parameter)], where


def _experts(shard: Shard, where: Tensor) -> str:
    """Which experts of the whole model these elements are of; empty for other tensors."""
    if ".experts." not in shard.name or ".shared_experts." in shard.name:
        return ""
    experts = (torch.unique(where // prod(shard.shape[1:])) + shard.offset[0]).tolist()
    more = ", ..." if len(experts) > _NAMED else ""
    return f" (expert{'s' * (len(experts) > 1)} {', '.join(map(str, experts[:_NAMED]))}{more})"


def _outputs(runner: StepRunner, batches: Sequence[Batch]) -> list[Found]:
    """Outputs of layers that are not finite, in the step's forward pass taken once more. Collective."""
    found: list[Found] = []
    with _watched(runner, batches, found):
        runner.evaluate(list(batches))
    return found


@contextmanager
def _watched(runner: StepRunner, batches: Sequence[Batch], found: list[Found]) -> Iterator[None]:
    modules = [(layer, module) for chunk in runner.chunks for layer, module in decoder_layers(chunk).items()]
    calls = dict.fromkeys((layer for layer, _ in modules), 0)
    dp, groups = runner.groups.layout.dp, runner.groups

    def look(layer: int, output: Any) -> None:
        index = calls[layer]
        calls[layer] += 1  # the schedule takes the micro-batches of a chunk in their order
        outputs = output if isinstance(output, tuple) else (output,)
        if all(bool(torch.isfinite(it).all()) for it in outputs if isinstance(it, Tensor) and it.is_floating_point()):
            return
        number = index * dp + groups.coordinate["dp"]
        where = f"in micro-batch {number} on rank {groups.rank}{_read_by(batches[index])}"
        text = f"The first output that is not finite is that of layer {layer}, {where}."
        found.append(((layer << 20) + number, text))

    hooks = [
        module.register_forward_hook(lambda module, inputs, output, layer=layer: look(layer, output))
        for layer, module in modules
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _read_by(batch: Batch) -> str:
    if batch.token_ids is None:
        return ""
    first, last = int(batch.samples.min()), int(batch.samples.max())
    samples = f"samples {first} to {last}" if last > first else f"sample {first}"
    return f", {samples} (tools/mixture.py sample {first} shows source and document)"

"""What a rank writes into a checkpoint: masters and states of what is trained, what is frozen, the model's buffers.

Engine.owned, frozen_ranges --model.parameters.shards--> pieces_of --> rectangles of logical tensors
"""

from collections.abc import Iterable, Iterator
from math import prod
from typing import Any

from gpt4moe.checkpoint.storage import Piece
from gpt4moe.model.parameters import buffers, shards
from gpt4moe.parallel.groups import ProcessGroups
from gpt4moe.parallel.layout import Layout
from gpt4moe.parallel.shard import BUFFER, WEIGHT, Shard, flat_rectangles
from gpt4moe.training.engine import Engine, OwnedRange


def owned_pieces(engine: Engine, groups: ProcessGroups, *, adapters_alone: bool = False) -> list[Piece]:
    """Everything this rank owns and writes, as rectangles of logical tensors.

    Args:
        adapters_alone: leave out what is frozen and the buffers, as they are the base's (stage.lora).
    """
    places = {id(parameter): shard for parameter, shard, _ in shards(engine.chunks, groups)}
    if adapters_alone:
        return pieces_of(engine.owned(), places)
    owned = (*engine.owned(), *frozen_ranges(engine.chunks, groups.layout, groups.rank))
    return pieces_of(owned, places) + buffer_pieces(engine.chunks, groups)


def frozen_ranges(chunks: list[Any], layout: Layout, rank: int) -> Iterator[OwnedRange]:
    """What a rank writes of the frozen parameters of its stage: each of the ranks with a copy an equal part. They have
    no optimizer states, and `master` is the weight itself, in its own dtype."""
    at = layout.coordinate(rank)
    for parameter in (parameter for chunk in chunks for parameter in chunk.parameters()):
        if parameter.requires_grad:
            continue
        index, count = at["cp"] + layout.cp * at["dp"], layout.cp * layout.dp
        if not getattr(parameter, "allreduce", True):
            index, count = at["expert_dp"], layout.expert_dp
        start, end = (parameter.numel() * place // count for place in (index, index + 1))
        if start < end:
            yield OwnedRange(parameter, start, end, parameter.detach().view(-1)[start:end], {})


def pieces_of(ranges: Iterable[OwnedRange], places: dict[int, Shard]) -> list[Piece]:
    """The pieces of those ranges that this rank writes; `places` has the shard of each parameter, by id."""
    pieces = []
    owned_shards = [(owned, places[id(owned.parameter)]) for owned in ranges]
    # Sorted by kind, so that a conversion, which needs only weights, reads no blocks of optimizer states.
    kinds = dict.fromkeys(kind for owned, _ in owned_shards for kind in (WEIGHT, *owned.states))
    for kind in kinds:
        for owned, shard in owned_shards:
            if not shard.is_writer or (kind != WEIGHT and kind not in owned.states):
                continue
            flat = owned.master if kind == WEIGHT else owned.states[kind]
            for part in flat_rectangles(owned.start, owned.end, shard.shape):
                values = flat[part.start - owned.start :][: prod(part.shape)]
                offset = tuple(a + b for a, b in zip(shard.offset, part.offset, strict=True))
                pieces.append(Piece(f"{kind}/{shard.name}", shard.global_shape, offset, part.shape, values))
    return pieces


def buffer_pieces(chunks: list[Any], groups: ProcessGroups) -> list[Piece]:
    """The model's buffers that this rank writes."""
    return [
        Piece(f"{BUFFER}/{shard.name}", shard.global_shape, shard.offset, shard.shape, tensor.detach().reshape(-1))
        for tensor, shard in buffers(chunks, groups)
        if shard.is_writer
    ]

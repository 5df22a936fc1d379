"""Builds one rank of a large world, alone: its groups, modules, buffers and optimizer, on the meta device.

groups --> model --> engine --> bytes, groups against Layout, owned ranges against the arithmetic of all ranks
                            `-> of a stage's first rank: the checkpoint files of every rank of the stage, hollow
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

from gpt4moe.checkpoint.saving import file_name, note_written
from gpt4moe.checkpoint.storage import Piece
from gpt4moe.checkpoint.writing import pieces_header
from gpt4moe.config.load import config_from_dict
from gpt4moe.config.optimizer_table import OPTIMIZERS
from gpt4moe.model.gpt import build_model
from gpt4moe.model.parameters import buffers, shards
from gpt4moe.parallel.groups import ProcessGroups
from gpt4moe.parallel.layout import COMBINED_AXES, DENSE_AXES, EXPERT_AXES, Layout
from gpt4moe.parallel.meta_device import pretended_rank
from gpt4moe.parallel.shard import Shard
from gpt4moe.rehearsal.files import write_hollow
from gpt4moe.rehearsal.rehearsal import HeldBytes, RankReport
from gpt4moe.training.engine import OwnedRange
from gpt4moe.training.engine_megatron import MegatronEngine
from gpt4moe.training.pieces import buffer_pieces, frozen_ranges, pieces_of

GROUPS = (*DENSE_AXES, *EXPERT_AXES, *COMBINED_AXES)


def owned_by(chunks: list[Any], layout: Layout, rank: int, states: Sequence[str]) -> Iterator[OwnedRange]:
    """What the optimizer of any rank of a stage owns, from the buffers that another of its ranks has built.

    Args:
        states: the optimizer's state tensors.
    """
    at = layout.coordinate(rank)
    for chunk in chunks:
        for packed, index, count in (
            (chunk.buffers, at["cp"] + layout.cp * at["dp"], layout.cp * layout.dp),
            (chunk.expert_parallel_buffers, at["expert_dp"], layout.expert_dp),
        ):
            for buffer in packed:
                yield from _share(buffer, index, count, states)


def _share(buffer: Any, index: int, count: int, states: Sequence[str]) -> Iterator[OwnedRange]:
    """What the rank at `index` of the `count` that reduce a buffer owns: an equal part of every bucket."""
    for parameter, (start, end, bucket_index) in buffer.param_index_map.items():
        bucket = buffer.buckets[bucket_index]
        part = bucket.grad_data.numel() // count
        low = max(start, bucket.offset + index * part)
        high = min(end, bucket.offset + (index + 1) * part)
        if low < high:
            values = torch.empty(high - low, device="meta")
            yield OwnedRange(parameter, low - start, high - start, values, dict.fromkeys(states, values))


def rehearse_rank(config: dict[str, Any], world_size: int, rank: int, checkpoint: Path | None) -> RankReport:
    """Builds one rank.

    Args:
        config: a resolved run, as config_to_dict gives it.
        checkpoint: where to write the hollow files of the rank's stage; None: not by this rank.
    """
    run = config_from_dict(config)
    layout = Layout.from_config(run.parallel, world_size)
    with pretended_rank(layout, rank) as groups:
        engine = MegatronEngine(build_model(run, groups, meta=True), run, groups)
        parameters = sum(p.numel() for chunk in engine.chunks for p in chunk.parameters())
        report = RankReport(rank=rank, held=held_bytes(engine), parameters=parameters)
        report.problems += group_problems(groups)
        places, states = _places(engine.chunks, groups), OPTIMIZERS[run.optimizer.kind].states
        if _boxes(pieces_of(owned_by(engine.chunks, layout, rank, states), places)) != _boxes(
            pieces_of(engine.owned(), places)
        ):
            report.problems.append("its optimizer owns other parts of the weights than the cut of its buffers says")
        if checkpoint is not None:
            report.stage_files = _write_stage(
                checkpoint, engine.chunks, groups, states, adapters_alone=run.model.lora is not None
            )
    return report


def group_problems(groups: ProcessGroups) -> Iterator[str]:
    """Groups of the built rank whose members are not the layout's."""
    for name in GROUPS:
        members = distributed.get_process_group_ranks(getattr(groups, name))
        expected = groups.layout.members(name, groups.rank)
        if members != expected:
            yield f"Megatron's group {name} is {_short(members)}, the layout says {_short(expected)}"


def _short(ranks: list[int]) -> str:
    return str(ranks) if len(ranks) <= 8 else f"{str(ranks[:8])[:-1]}, ... {len(ranks)} ranks]"


def _places(chunks: list[Any], groups: ProcessGroups) -> dict[int, Shard]:
    return {id(parameter): shard for parameter, shard, _ in shards(chunks, groups)}


def _boxes(pieces: list[Piece]) -> list[tuple[Any, ...]]:
    return sorted((piece.tensor, piece.global_shape, piece.offset, piece.shape) for piece in pieces)


def _write_stage(
    folder: Path, chunks: list[Any], groups: ProcessGroups, states: Sequence[str], *, adapters_alone: bool
) -> int:
    """The checkpoint file of every rank of the groups' stage, with true headers and holes for data."""
    layout = groups.layout
    first = groups.coordinate["pp"] * layout.stage_size
    places: dict[tuple[int, ...], dict[int, Shard]] = {}  # of the few kinds of ranks: copies hold the same
    has_buffers = not adapters_alone and any(True for _ in buffers(chunks, groups))
    for rank in range(first, first + layout.stage_size):
        other = replace(groups, rank=rank)
        kind = tuple(other.coordinate[axis] for axis in ("tp", "etp", "ep"))
        if kind not in places:
            places[kind] = _places(chunks, other)
        frozen = () if adapters_alone else frozen_ranges(chunks, layout, rank)
        pieces = pieces_of((*owned_by(chunks, layout, rank, states), *frozen), places[kind])
        pieces += buffer_pieces(chunks, other) if has_buffers else []
        path = folder / file_name(rank)
        note_written(folder, rank, write_hollow(path, *pieces_header(path, pieces)))
    return layout.stage_size


def held_bytes(engine: Any) -> HeldBytes:
    """Of engine=megatron: parameter buffers, gradient buffers, and the optimizer's own tensors."""
    chunks = engine.chunks
    buffers = [buffer for chunk in chunks for buffer in chunk.buffers + chunk.expert_parallel_buffers]
    weights = _storages(
        [parameter for chunk in chunks for parameter in chunk.parameters()] + [b.param_data for b in buffers]
    )
    gradients = _storages(buffer.grad_data for buffer in buffers)
    states: list[Tensor] = []
    for inner in getattr(engine.optimizer, "chained_optimizers", [engine.optimizer]):
        if getattr(inner, "is_stub_optimizer", False):
            continue
        for group in inner.optimizer.param_groups:
            states += group["params"]
        for state in inner.optimizer.state.values():
            states += [value for value in state.values() if isinstance(value, Tensor)]
    optimizer = _storages(states)
    for seen in weights.keys() | gradients.keys():  # masters of fp32 weights are the weights
        optimizer.pop(seen, None)
    return HeldBytes(sum(weights.values()), sum(gradients.values()), sum(optimizer.values()))


def zero_held_bytes(engine: Any) -> HeldBytes:
    """Of engine=deepspeed: parameters, their fp32 gradients, and the tensors of DeepSpeed's inner optimizer that are on
    the parameters' device."""
    weights = [parameter for chunk in engine.chunks for parameter in chunk.parameters()]
    inner = engine.optimizer.optimizer
    states = [tensor for group in inner.param_groups for tensor in group["params"]]
    states += [tensor for state in inner.state.values() for tensor in state.values()]
    parts = (weights, [partition.gradients for partition in engine.partitions], states)
    return HeldBytes(*(sum(_storages(part).values()) for part in parts))


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes of every storage once."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage._cdata: storage.nbytes() for storage in storages}

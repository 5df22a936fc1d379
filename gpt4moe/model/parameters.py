"""The parameters and buffers of a rank: logical name, the part of it that the rank holds, how its gradient is reduced.

The table of tensors (architecture.table) says how each is cut. Initial weights, checkpoints and the layout tests read
`shards`. Megatron's gradient buffers and finalisation read the marks that `mark` puts on parameters.

    a chunk's parameter                                the logical tensor
    decoder.layers.1.mlp.experts.gate_up  [L, 2F, H]   decoder.layers.7.mlp.experts.gate_up  [E, 2, F, H]

In a logical tensor layers have their index in the whole model, and an expert axis has all experts. Gate and up are a
dimension of their own, so that every shard is one rectangle.
"""

from collections.abc import Collection, Iterable, Iterator
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from gpt4moe.architecture.names import OUTPUT_LAYER, WORD_EMBEDDINGS, layer_name
from gpt4moe.architecture.rows import Cut, Initial, Spread, TensorRow
from gpt4moe.architecture.tensors import row_of
from gpt4moe.config.model import ModelConfig
from gpt4moe.model.resampler import VisionChunk
from gpt4moe.moe.layer import ExpertParallelMLP
from gpt4moe.parallel.groups import ProcessGroups
from gpt4moe.parallel.rng import normal_box
from gpt4moe.parallel.shard import WEIGHT, Shard

CONSTANTS = {Initial.ones: 1.0, Initial.zeros: 0.0}


def decoder_layers(chunk: nn.Module) -> dict[int, Any]:
    """Index in the whole model -> layer, of the decoder of one chunk (a GPTModel, wrapped or not)."""
    model: Any = getattr(chunk, "module", chunk)
    if isinstance(model, VisionChunk):
        return {}
    return {layer.layer_number - 1: layer for layer in model.decoder.layers}


def language_chunks(chunks: list[Any]) -> list[Any]:
    """The GPTModels among the chunks of a rank, wrapped or not: what the pipeline schedule runs."""
    return [chunk for chunk in chunks if not isinstance(getattr(chunk, "module", chunk), VisionChunk)]


def vision_chunk(chunks: list[Any]) -> Any:
    """The resampler's chunk of a vision model, wrapped or not: the last one."""
    assert isinstance(getattr(chunks[-1], "module", chunks[-1]), VisionChunk)
    return chunks[-1]


def moe_layers(chunks: list[Any]) -> dict[int, ExpertParallelMLP]:
    """Index in the whole model -> its expert-parallel MLP, for the layers of these chunks that have one."""
    return {
        index: layer.mlp
        for chunk in chunks
        for index, layer in decoder_layers(chunk).items()
        if isinstance(layer.mlp, ExpertParallelMLP)
    }


def shards(chunks: list[nn.Module], groups: ProcessGroups) -> Iterator[tuple[nn.Parameter, Shard, TensorRow]]:
    """Every parameter of this rank's chunks, its rectangle of the logical tensor, and its row of the table.

    Chunks are GPTModels and the resampler's chunk, wrapped or not. A shard's `shape` is the parameter's elements in C
    order, viewed as the logical tensor is (gate_up as [L, 2, F, H]).
    """
    for chunk in chunks:
        for name, parameter in _named(chunk, lambda module: module.named_parameters()):
            is_copy = getattr(parameter, "shared", False)  # the last stage's copy of a tied embedding
            logical = WORD_EMBEDDINGS if is_copy and name == OUTPUT_LAYER else name
            row = row_of(logical)
            yield parameter, _shard(logical, tuple(parameter.shape), row.cut, groups, not is_copy), row


def buffers(chunks: list[nn.Module], groups: ProcessGroups) -> Iterator[tuple[Tensor, Shard]]:
    """State of the model that no gradient moves (a router's): fp32, whole and the same on every rank of a pipeline
    stage. The stage's first rank writes it."""
    is_first = all(groups.coordinate[axis] == 0 for axis in ("tp", "cp", "dp"))
    for chunk in chunks:
        for name, buffer in _named(chunk, lambda module: module.named_buffers()):
            assert buffer.dtype == torch.float32, name
            shape = tuple(buffer.shape)
            yield buffer, Shard(name, shape, (0,) * len(shape), shape, is_first)


def _named(chunk: nn.Module, named: Any) -> Iterator[tuple[str, Any]]:
    """The tensors of a chunk by their logical names, in the order of its modules.

    Decoder layers are found as modules. A pattern over names would take the layers of another part of the model, such
    as `vision.layers.3`, for the decoder's.
    """
    inside = {
        id(tensor): layer_name(index, name)
        for index, layer in decoder_layers(chunk).items()
        for name, tensor in named(layer)
    }
    for name, tensor in named(getattr(chunk, "module", chunk)):
        yield inside.get(id(tensor), name), tensor


def _shard(name: str, local: tuple[int, ...], cut: Cut, groups: ProcessGroups, is_writer: bool) -> Shard:
    layout, at = groups.layout, groups.coordinate
    if cut.is_gated:
        local = (*local[:-2], 2, local[-2] // 2, local[-1])
    axes = cut.axes
    sizes = [getattr(layout, axes[dim]) if dim in axes else 1 for dim in range(len(local))]
    global_shape = tuple(n * size for n, size in zip(local, sizes, strict=True))
    offset = tuple(n * at[axes[dim]] if dim in axes else 0 for dim, n in enumerate(local))
    copies = {Cut.whole: "tp", Cut.experts_whole: "etp"}.get(cut)
    if cut is Cut.everywhere:
        is_writer, copies = is_writer and at["pp"] == 0, "tp"
    writes = is_writer and (copies is None or at[copies] == 0)
    return Shard(name, global_shape, offset, local, writes)


@torch.no_grad()
def initialize(
    chunks: list[nn.Module], model: ModelConfig, groups: ProcessGroups, seed: int, *, loaded: Collection[str] = ()
) -> None:
    """Fills every parameter of this rank with its part of the logical tensor's initial value.

    The numbers follow from the seed, the logical name and the place in the logical tensor, so they are the same on
    every layout, device and precision (up to rounding).

    Args:
        loaded: KIND/NAME of tensors that the caller loads next. They are not drawn, which takes minutes for a large
            model, but have a NaN: if nothing loaded one, the first loss would show it.
    """
    deviation = {
        Initial.unit: 1.0,
        Initial.normal: model.init_std,
        Initial.residual: model.init_std / sqrt(2 * model.num_layers),
    }
    for parameter, shard, row in shards(chunks, groups):
        if f"{WEIGHT}/{shard.name}" in loaded:
            _spoil(parameter, shard.name)
            continue
        if row.initial in CONSTANTS:
            parameter.fill_(CONSTANTS[row.initial])
            continue
        assert row.initial is not None, f"{shard.name}: the table says that the trainer cannot build it"
        box = normal_box(seed, shard.name, shard.global_shape, shard.offset, shard.shape)
        scale = deviation.get(row.initial, 1 / sqrt(3 * shard.global_shape[-1]))  # by_input
        parameter.copy_((box * scale).view(parameter.shape))


def _spoil(parameter: Tensor, name: str) -> None:
    """A NaN in every row, but one alone in each matrix of experts and linear layers, which no token gets round: one in
    every row would touch every page of the model, in one thread, before several threads load it."""
    is_product = any(f".{kind}" in name for kind in ("experts.", "linear_"))
    (parameter[..., 0, 0] if is_product else parameter[..., 0]).fill_(torch.nan)


def freeze(chunks: list[nn.Module], groups: ProcessGroups, trained: Collection[str]) -> None:
    """Leaves gradients to the parameters of these logical names alone. Call it before the engine wraps the chunks."""
    for parameter, shard, _ in shards(chunks, groups):
        parameter.requires_grad_(shard.name in trained)


def mark(chunks: Iterable[nn.Module], *, sequence_parallel: bool) -> None:
    """Tells Megatron how each parameter's gradient is reduced. Call it before the engine wraps the chunks.

    Megatron has other marks for its own gradient norm; ours counts by Shard.is_writer (training.engine).
    """
    for chunk in chunks:
        for name, parameter in _named(chunk, lambda module: module.named_parameters()):
            row = row_of(name)
            spread = row.cut.spread
            if row.cut is Cut.everywhere:
                parameter.on_every_stage = True  # training.images sums its gradient over tp x pp
            elif spread is Spread.whole:
                # Every tp rank saw other tokens (norms, the router) or other heads (norms of queries and keys): the
                # gradient is summed over tp.
                parameter.sequence_parallel = sequence_parallel
            elif spread is Spread.experts:
                parameter.allreduce = False  # reduced over expert_dp, not over dp


def reduced_over(parameter: nn.Parameter) -> tuple[str, ...]:
    """The groups that a marked parameter's gradient is summed over, innermost first, as ProcessGroups names them."""
    copies = "dp_cp" if getattr(parameter, "allreduce", True) else "expert_dp"
    return ("tp", copies) if getattr(parameter, "sequence_parallel", False) else (copies,)

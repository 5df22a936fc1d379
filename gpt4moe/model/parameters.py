"""Parameters of a rank: what each is called in the whole model, which part of it the rank holds, how it is reduced.

The table is cuts.py. One place for each truth: initial weights, checkpoints and the layout tests all read `shards`;
the marks that `mark` puts on the parameters tell Megatron's gradient buffers and finalisation how to reduce each.

    a chunk's name                                     the logical tensor
    decoder.layers.1.mlp.experts.gate_up  [L, 2F, H]   decoder.layers.7.mlp.experts.gate_up  [E, 2, F, H]

Layer numbers are global, expert axes too; gate and up are an axis of their own, so that every shard is one rectangle.
"""

import re
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from gpt4moe.architecture.cuts import AXES, Cut, Rule, rule_of
from gpt4moe.parallel.groups import ProcessGroups
from gpt4moe.parallel.shard import Shard

_TIED_COPY = ("output_layer.weight", "embedding.word_embeddings.weight")


def shards(chunks: list[nn.Module], groups: ProcessGroups) -> Iterator[tuple[nn.Parameter, Shard, Rule]]:
    """Every parameter of this rank's chunks with its rectangle of the logical tensor and its rule.

    Chunks are GPTModels, wrapped or not. A shard's `shape` is the parameter's elements in C order, viewed as the
    logical tensor is (gate_up as [L, 2, F, H]).
    """
    for wrapped in chunks:
        chunk = getattr(wrapped, "module", wrapped)
        numbers = [layer.layer_number - 1 for layer in chunk.decoder.layers]
        for name, parameter in chunk.named_parameters():
            rule = rule_of(name)
            logical = _global_name(name, numbers)
            is_copy = getattr(parameter, "shared", False)  # the last stage's copy of a tied embedding
            if is_copy:
                logical = logical.replace(*_TIED_COPY)
            yield parameter, _shard(logical, tuple(parameter.shape), rule.cut, groups, not is_copy), rule


def buffers(chunks: list[nn.Module], groups: ProcessGroups) -> Iterator[tuple[Tensor, Shard]]:
    """State of the model that no gradient moves (a router's bias): fp32, whole and the same on every rank of a pipeline
    stage. The stage's first rank writes it."""
    is_first = all(groups.coordinate[axis] == 0 for axis in ("tp", "cp", "dp"))
    for wrapped in chunks:
        chunk = getattr(wrapped, "module", wrapped)
        numbers = [layer.layer_number - 1 for layer in chunk.decoder.layers]
        for name, buffer in chunk.named_buffers():
            assert buffer.dtype == torch.float32, name
            shape = tuple(buffer.shape)
            yield buffer, Shard(_global_name(name, numbers), shape, (0,) * len(shape), shape, is_first)


def _global_name(name: str, layer_numbers: list[int]) -> str:
    return re.sub(r"layers\.(\d+)\.", lambda match: f"layers.{layer_numbers[int(match.group(1))]}.", name)


def mark(chunks: list[nn.Module], *, sequence_parallel: bool) -> None:
    """Tells Megatron how each parameter's gradient is reduced; before the engine wraps the chunks.

    It also has marks for its own gradient norm. Ours counts by Shard.is_writer (training.clipping).
    """
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            cut = rule_of(name).cut
            if cut is Cut.whole:
                # Every tp rank saw other tokens (norms, the router) or other heads (q_layernorm, k_layernorm): the
                # gradient is summed over tp.
                parameter.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]
            elif cut in (Cut.experts, Cut.experts_gated):
                parameter.allreduce = False  # type: ignore[attr-defined]  # reduced over expert_dp, not over dp


def reduced_over(parameter: nn.Parameter) -> tuple[str, ...]:
    """The groups that a marked parameter's gradient is summed over, innermost first, as ProcessGroups names them."""
    copies = "dp_cp" if getattr(parameter, "allreduce", True) else "expert_dp"
    return ("tp", copies) if getattr(parameter, "sequence_parallel", False) else (copies,)


def _shard(name: str, local: tuple[int, ...], cut: Cut, groups: ProcessGroups, is_writer: bool) -> Shard:
    layout, at = groups.layout, groups.coordinate
    if cut in (Cut.gated_rows, Cut.experts_gated):
        local = (*local[:-2], 2, local[-2] // 2, local[-1])
    axes = AXES[cut]
    sizes = [getattr(layout, axes[dim]) if dim in axes else 1 for dim in range(len(local))]
    global_shape = tuple(n * size for n, size in zip(local, sizes, strict=True))
    offset = tuple(n * at[axes[dim]] if dim in axes else 0 for dim, n in enumerate(local))
    writes = is_writer and (cut is not Cut.whole or at["tp"] == 0)
    return Shard(name, global_shape, offset, local, writes)

"""Memory of the fullest rank of each pipeline stage, line by line, in bytes.

    weights, gradients, optimizer   as the engine's buffers and optimizer hold them, to the byte (gradient_buffers,
                                    zero_partition)
    activations                     what autograd keeps (activations), for the micro-batches that are live at once
    buffers                         messages between stages, one layer's workspace
    reserve                         what no formula sees: the driver's context, NCCL's buffers, fragmentation

Every stage by itself: stages differ in layers, in live micro-batches, and the first and last hold the vocabulary. Ranks
of a stage differ in what their optimizers own (padding falls on the last ones).
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from itertools import accumulate
from operator import sub
from typing import TypeVar

from gpt4moe.architecture.count import chunk_tensors
from gpt4moe.architecture.rows import Component, Spread
from gpt4moe.architecture.tensors import ModelTensor
from gpt4moe.config.cluster import Generation
from gpt4moe.config.optimizer import Dtype, EngineKind
from gpt4moe.config.parallel import Recompute
from gpt4moe.config.plan import DEFAULT_IMBALANCE
from gpt4moe.config.run import RunConfig
from gpt4moe.parallel.layout import Layout
from gpt4moe.parallel.placement import rank_chunks, stage_layers
from gpt4moe.pipeline.schedule import virtual_order, warmup_forwards
from gpt4moe.planner.activations import (
    FLOAT,
    MicroBatch,
    embedding_activations,
    head_activations,
    layer_bytes,
    mask_bytes,
)
from gpt4moe.planner.gradient_buffers import GradientBuffer, PackedTensor, default_bucket_size, pack
from gpt4moe.planner.state_bytes import GRADIENT_BYTES, VALUE_BYTES, owned_bytes
from gpt4moe.planner.workspace import head_workspace, layer_workspace
from gpt4moe.planner.zero_partition import zero_states

CONTEXT_BYTES = 2_000_000_000
"""A GPU's driver context and NCCL's buffers: an assumption."""
FRAGMENTATION = 0.05
"""Of activations and buffers, lost between the allocator's blocks: an assumption."""
Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True, slots=True)
class StageMemory:
    """The fullest rank of one pipeline stage."""

    stage: int
    rank: int
    """The first one of those that hold the most."""
    weights_bytes: int
    gradients_bytes: int
    """fp32, main gradients."""
    optimizer_bytes: int
    """fp32 masters (of bf16 weights), both moments, step counts; 0 where the optimizer lives in host memory."""
    activations_bytes: int
    buffers_bytes: int
    reserve_bytes: int

    @property
    def total_bytes(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self) if field.name.endswith("_bytes"))

    @property
    def states_bytes(self) -> int:
        return self.weights_bytes + self.gradients_bytes + self.optimizer_bytes


@dataclass(frozen=True, slots=True)
class ChunkBuffers:
    """The gradient buffers of one virtual stage."""

    dense: GradientBuffer
    expert: GradientBuffer

    @property
    def numel(self) -> int:
        return self.dense.numel + self.expert.numel


def memory_per_stage(
    run: RunConfig, layout: Layout, *, imbalance: float = DEFAULT_IMBALANCE, known: "KnownStates | None" = None
) -> list[StageMemory]:
    """Of a legal layout.

    Args:
        imbalance: rows at the fullest rank's experts over an even share, 1.0 or more; without effect at ep 1.
        known: states of other calls with the same model, engine, precision and degrees, which it grows.
    """
    micro = MicroBatch.of(run, layout, imbalance)
    alike = alike_stages(run, layout)
    live = live_activations(run, layout, micro)
    passing = peak_live_bytes(run, layout, _of_each(alike, lambda stage: _kept_messages(run, layout, micro, stage)))
    workspaces = _of_each(alike, lambda stage: _workspace(run, layout, micro, stage))
    states = {} if known is None else known
    stages = []
    for stage, like in enumerate(alike):
        if like not in states:
            states[like] = _STATES[run.engine.kind](run, layout, like)
        held = states[like]
        buffers = passing[stage] + workspaces[stage]
        stages.append(StageMemory(
            stage=stage,
            rank=stage * layout.stage_size + held.fullest,
            weights_bytes=held.weights,
            gradients_bytes=held.gradients,
            optimizer_bytes=held.optimizer,
            activations_bytes=live[stage],
            buffers_bytes=buffers,
            reserve_bytes=reserve_bytes(run, live[stage] + buffers),
        ))  # fmt: skip
    return stages


def reserve_bytes(run: RunConfig, moving_bytes: float) -> int:
    """What a device loses before the first tensor, and between blocks of activations and buffers; a CPU nothing."""
    return 0 if run.cluster.generation is Generation.cpu else CONTEXT_BYTES + int(FRAGMENTATION * moving_bytes)


def alike_stages(run: RunConfig, layout: Layout) -> list[int]:
    """For each stage, the first one that is like it: the same kinds of layers, the same ends of the model."""
    chunks, kinds = stage_layers(run.model.num_layers, run.parallel), run.model.layer_kinds
    first: dict[tuple[object, ...], int] = {}
    return [
        first.setdefault(
            (stage == 0, stage == layout.pp - 1, *(
                tuple(kinds[layer] for layer in layers) for layers in chunks[stage :: layout.pp]
            )),
            stage,
        )
        for stage in range(layout.pp)
    ]  # fmt: skip


def _of_each(alike: list[int], value: Callable[[int], Value]) -> list[Value]:
    """Of every stage, worked out once for those that are alike."""
    known = {stage: value(stage) for stage in set(alike)}
    return [known[stage] for stage in alike]


@dataclass(frozen=True, slots=True)
class _States:
    """Bytes of the fullest rank of a stage, and its place in it."""

    weights: int
    gradients: int
    optimizer: int
    fullest: int


KnownStates = dict[int, _States]
"""Stage -> its states, for the first of those that are alike."""


def _megatron_states(run: RunConfig, layout: Layout, stage: int) -> _States:
    packed = stage_buffers(run, layout, stage)
    numel, optimizer = sum(chunk.numel for chunk in packed), optimizer_bytes(run, layout, packed)
    item = VALUE_BYTES[run.precision.dtype]
    return _States(numel * item, numel * GRADIENT_BYTES, max(optimizer), optimizer.index(max(optimizer)))


def _deepspeed_states(run: RunConfig, layout: Layout, stage: int) -> _States:
    held = zero_states(run, layout, stage)
    return _States(held.weights, held.gradients, held.optimizer, 0)


_STATES = {EngineKind.megatron: _megatron_states, EngineKind.deepspeed: _deepspeed_states}


def stage_buffers(run: RunConfig, layout: Layout, stage: int) -> list[ChunkBuffers]:
    """engine=megatron's gradient buffers of each virtual stage of one pipeline stage."""
    chunks = chunk_tensors(run.model, run.parallel, stage)
    # Megatron cuts buffers into buckets on the first stage alone, and only to overlap.
    buckets = stage == 0 and run.engine.overlap_grad_reduce
    size = (run.engine.bucket_size or default_bucket_size(layout.dp)) if buckets else None

    def packed(tensors: list[ModelTensor], is_expert: bool, ranks: int) -> GradientBuffer:
        return pack(
            (
                PackedTensor(t.local_size(run.parallel), _own_bucket(run, t))
                for t in tensors
                if (t.spread is Spread.experts) is is_expert
            ),
            ranks,
            size,
        )

    return [
        ChunkBuffers(packed(chunk, False, layout.dp * layout.cp), packed(chunk, True, layout.expert_dp))
        for chunk in chunks
    ]


def optimizer_bytes(run: RunConfig, layout: Layout, buffers: list[ChunkBuffers]) -> list[int]:
    """Of every rank of a stage whose gradient buffers these are, in the order of its ranks."""
    each = owned_bytes(run)

    def held(parts: list[GradientBuffer]) -> list[int]:
        elements = zip(*(part.owned_elements for part in parts), strict=True)
        tensors = zip(*(part.owned_tensors for part in parts), strict=True)
        return [each * sum(e) + FLOAT * sum(t) for e, t in zip(elements, tensors, strict=True)]

    dense, expert = held([chunk.dense for chunk in buffers]), held([chunk.expert for chunk in buffers])
    copies = layout.ep * layout.etp
    return [dense[inside // layout.tp] + expert[inside // copies] for inside in range(layout.stage_size)]


def live_activations(run: RunConfig, layout: Layout, micro: MicroBatch) -> list[int]:
    """What autograd keeps at the fullest moment of each pipeline stage, and masks."""
    alike = alike_stages(run, layout)
    kept = _of_each(alike, lambda stage: chunk_activations(run, layout, micro, stage))
    again = _of_each(alike, lambda stage: again_bytes(run, layout, micro, stage))
    return [a + b + mask_bytes(micro) for a, b in zip(peak_live_bytes(run, layout, kept), again, strict=True)]


def peak_live_bytes(run: RunConfig, layout: Layout, kept: list[list[int]]) -> list[int]:
    """The most that each pipeline stage holds at once, at the fullest moment of its schedule: schedule.peak_live
    without the table. The k-th forward pass of a rank finds the forward passes before it done, and the backward passes
    of those that are further back than the warm-up.

    Args:
        kept: by one micro-batch in each virtual stage of each pipeline stage.
    """
    micro_batches = run.training.global_batch_size // (run.training.micro_batch_size * layout.dp)
    enough = min(micro_batches, 3 * layout.pp)  # a longer steady state holds no more
    if layout.vpp == 1:
        return [own[0] * min(enough, layout.pp - stage) for stage, own in enumerate(kept)]
    order = [chunk for _, chunk in virtual_order(layout.vpp, enough, layout.pp)]
    sums: dict[tuple[int, ...], tuple[list[int], list[int]]] = {}
    peaks = []
    for stage, own in enumerate(kept):
        if tuple(own) not in sums:
            done = list(accumulate(own[chunk] for chunk in order))
            sums[tuple(own)] = done, [0, *accumulate(own[layout.vpp - 1 - chunk] for chunk in order)]
        done, freed = sums[tuple(own)]
        warmup = warmup_forwards(stage, pp=layout.pp, vpp=layout.vpp, micro_batches=enough)
        peaks.append(max([done[min(warmup, len(done) - 1)], *map(sub, done[warmup:], freed)]))
    return peaks


def chunk_activations(run: RunConfig, layout: Layout, micro: MicroBatch, stage: int) -> list[int]:
    """What one micro-batch leaves in each virtual stage of a pipeline stage."""
    kept = []
    for vp_stage, layers in enumerate(rank_chunks(run.model.num_layers, run.parallel, stage)):
        whole = sum(layer_bytes(micro, layer, recompute_of(run, place)) for place, layer in enumerate(layers))
        parts = []
        if Recompute.full in {recompute_of(run, place) for place in range(len(layers))}:
            parts.append({"rotary": micro.sequence * run.model.head_size * FLOAT})  # handed to every such layer
        if stage == 0 and vp_stage == 0:
            parts.append(embedding_activations(micro))
        if stage == layout.pp - 1 and vp_stage == layout.vpp - 1:
            parts.append(head_activations(micro))
        kept.append(whole + sum(sum(part.values()) for part in parts))
    return kept


def recompute_of(run: RunConfig, place: int) -> Recompute:
    """What is computed again of the layer at a place within its virtual stage."""
    limit = run.parallel.recompute_layers
    return Recompute.none if limit is not None and place >= limit else run.parallel.recompute


def again_bytes(run: RunConfig, layout: Layout, micro: MicroBatch, stage: int) -> int:
    """What the backward pass of one layer brings back, the most of any. The head's is gone by then."""
    most = 0
    for layers in rank_chunks(run.model.num_layers, run.parallel, stage):
        for place, layer in enumerate(layers):
            gone = layer_bytes(micro, layer) - layer_bytes(micro, layer, recompute_of(run, place))
            most = max(most, gone)
    head = sum(head_activations(micro).values()) if stage == layout.pp - 1 else 0
    return max(0, most - head)


def _own_bucket(run: RunConfig, tensor: ModelTensor) -> bool:
    return run.model.tied_embeddings and run.parallel.pp > 1 and tensor.component is Component.embedding


def _kept_messages(run: RunConfig, layout: Layout, micro: MicroBatch, stage: int) -> list[int]:
    """Inputs and outputs that the schedule keeps with a live micro-batch, of each virtual stage."""
    last = layout.pp * layout.vpp - 1
    # A fused norm keeps the input itself, the unfused one of bf16 a copy.
    has_copy = not (micro.fused_norm or run.precision.dtype is Dtype.fp32)
    places = range(stage, last + 1, layout.pp)
    return [micro.hidden_bytes * ((place < last) + (place > 0 and has_copy)) for place in places]


def _workspace(run: RunConfig, layout: Layout, micro: MicroBatch, stage: int) -> int:
    """The largest of the stage's layers and its head, which come one after another, and two messages under way."""
    layers = [layer for chunk in rank_chunks(run.model.num_layers, run.parallel, stage) for layer in chunk]
    largest = max(layer_workspace(micro, layer) for layer in layers)
    if stage == layout.pp - 1:
        largest = max(largest, head_workspace(micro))
    return largest + (2 * micro.hidden_bytes if layout.pp > 1 else 0)

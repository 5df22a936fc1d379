"""Weights, gradients and optimizer states of the ranks of a pipeline stage, in bytes, as each engine lays them out.

    engine=megatron   flat buffers of parameters and gradients, padded (gradient_buffers); each rank's optimizer owns a
                      part of every buffer
    engine=deepspeed  ZeRO-1: up to four flat groups, each padded and cut equally over the ranks that share it

Weights and fp32 gradients lie on every rank that computes with them; fp32 masters and moments on the rank that owns
them, or in host memory. Tests compare these bytes with built buffers and optimizers: they are equal.
"""

from dataclasses import dataclass

from gpt4moe.architecture.count import chunk_tensors
from gpt4moe.architecture.rows import Component, Spread
from gpt4moe.architecture.tensors import ModelTensor
from gpt4moe.config.optimizer import Dtype, EngineKind
from gpt4moe.config.run import RunConfig
from gpt4moe.parallel.layout import Layout
from gpt4moe.planner.gradient_buffers import GradientBuffer, PackedTensor, default_bucket_size, pack

VALUE_BYTES = {Dtype.bf16: 2, Dtype.fp32: 4}
"""Of a weight or an activation."""
GRADIENT_BYTES = 4
"""Of a gradient: kept and reduced in fp32."""
_OWNED_BYTES = {
    (EngineKind.megatron, Dtype.bf16): 12,
    (EngineKind.megatron, Dtype.fp32): 8,  # the master of an fp32 weight is the weight itself
    (EngineKind.deepspeed, Dtype.bf16): 12,
    (EngineKind.deepspeed, Dtype.fp32): 12,  # the master is a copy here too
}
"""fp32 master and both moments of one element."""
_STEP_BYTES = 4
"""A step count: of each parameter under Megatron, of each group under DeepSpeed."""
_ZERO_ALIGNMENT = 2
"""Elements to which DeepSpeed pads a rank's cut of a group (0.19.8, runtime/zero/stage_1_and_2.py)."""


@dataclass(frozen=True, slots=True)
class RankStates:
    """Bytes of the rank of a stage that holds the most."""

    weights: int
    gradients: int
    optimizer: int
    """On the device: 0 where it lives in host memory."""
    fullest: int
    """The first of the stage's ranks that hold the most: its place in the stage."""


@dataclass(frozen=True, slots=True)
class ChunkBuffers:
    """Megatron's gradient buffers of one virtual stage. Experts have their own: other ranks reduce them."""

    dense: GradientBuffer
    expert: GradientBuffer

    @property
    def numel(self) -> int:
        return self.dense.numel + self.expert.numel


def owned_bytes(run: RunConfig) -> int:
    """Optimizer states of one element on the device of the rank that owns it; 0 where they live in host memory."""
    return 0 if run.engine.offload_optimizer else _OWNED_BYTES[run.engine.kind, run.precision.dtype]


def fullest_states(run: RunConfig, layout: Layout, stage: int) -> RankStates:
    """Of the rank of a pipeline stage that holds the most. The layout is legal."""
    return _STATES[run.engine.kind](run, layout, stage)


def stage_buffers(run: RunConfig, layout: Layout, stage: int) -> list[ChunkBuffers]:
    """engine=megatron's gradient buffers of each virtual stage of one pipeline stage."""
    chunks = chunk_tensors(run.model, run.parallel, stage)
    # Megatron cuts buffers into buckets on the first stage alone, and only to overlap.
    buckets = stage == 0 and run.engine.overlap_grad_reduce
    size = (run.engine.bucket_size or default_bucket_size(layout.dp)) if buckets else None

    def packed(tensors: list[ModelTensor], is_expert: bool, ranks: int) -> GradientBuffer:
        return pack(
            (
                PackedTensor(t.local_size(run.parallel), _is_shared_embedding(run, t))
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
    """engine=megatron's optimizer states of every rank of a stage, in the order of its ranks.

    Args: buffers: stage_buffers of that stage.
    """
    each = owned_bytes(run)

    def owned(parts: list[GradientBuffer]) -> list[int]:
        elements = zip(*(part.owned_elements for part in parts), strict=True)
        tensors = zip(*(part.owned_tensors for part in parts), strict=True)
        return [each * sum(e) + _STEP_BYTES * sum(t) for e, t in zip(elements, tensors, strict=True)]

    dense, expert = owned([chunk.dense for chunk in buffers]), owned([chunk.expert for chunk in buffers])
    copies = layout.ep * layout.etp
    return [dense[inside // layout.tp] + expert[inside // copies] for inside in range(layout.stage_size)]


def _megatron_states(run: RunConfig, layout: Layout, stage: int) -> RankStates:
    packed = stage_buffers(run, layout, stage)
    numel, optimizer = sum(chunk.numel for chunk in packed), optimizer_bytes(run, layout, packed)
    item = VALUE_BYTES[run.precision.dtype]
    return RankStates(numel * item, numel * GRADIENT_BYTES, max(optimizer), optimizer.index(max(optimizer)))


def _deepspeed_states(run: RunConfig, layout: Layout, stage: int) -> RankStates:
    """All ranks of a stage hold equally much."""
    groups: dict[str, tuple[int, int]] = {}  # name -> elements, ranks that share it
    for chunk in chunk_tensors(run.model, run.parallel, stage):
        for tensor in chunk:
            name = _zero_group(run, tensor)
            size, _ = groups.get(name, (0, 0))
            ranks = layout.expert_dp if name == "experts" else layout.dp * layout.cp
            groups[name] = size + tensor.local_size(run.parallel), ranks
    cuts = [(-(-size // (_ZERO_ALIGNMENT * ranks)) * _ZERO_ALIGNMENT, ranks) for size, ranks in groups.values()]
    whole = sum(cut * ranks for cut, ranks in cuts)
    owned = sum(cut * owned_bytes(run) + _STEP_BYTES for cut, _ in cuts)
    return RankStates(
        whole * VALUE_BYTES[run.precision.dtype],
        whole * GRADIENT_BYTES,
        0 if run.engine.offload_optimizer else owned,
        fullest=0,
    )


def _zero_group(run: RunConfig, tensor: ModelTensor) -> str:
    """The parameter group of a tensor, as the DeepSpeed engine (training room) makes them."""
    if tensor.spread is Spread.experts:
        return "experts"
    if _is_shared_embedding(run, tensor):
        return "tied"
    return "matrices" if len(tensor.shape) > 1 else "norms"


def _is_shared_embedding(run: RunConfig, tensor: ModelTensor) -> bool:
    """A tied embedding that the first and the last stage both hold, and must cut alike."""
    return run.model.tied_embeddings and run.parallel.pp > 1 and tensor.component is Component.embedding


_STATES = {EngineKind.megatron: _megatron_states, EngineKind.deepspeed: _deepspeed_states}

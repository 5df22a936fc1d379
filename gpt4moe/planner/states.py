"""Weights, gradients and optimizer states of the ranks of a pipeline stage, in bytes, as each engine lays them out.

    engine=megatron   flat buffers of parameters and gradients, padded (gradient_buffers); each rank's optimizer owns a
                      part of every buffer
    engine=deepspeed  ZeRO-1: up to four flat groups, and more for entries of optimizer.by_pattern; each padded and cut
                      equally over the ranks that share it

Weights and fp32 gradients are on every rank that computes with them. fp32 masters and moments are on the rank that owns
them, or in host memory. Tests hold these bytes equal to those of built buffers and optimizers.
"""

from dataclasses import dataclass, replace

from gpt4moe.architecture.count import chunk_tensors
from gpt4moe.architecture.rows import Component, Cut, Spread
from gpt4moe.architecture.tensors import ModelTensor
from gpt4moe.architecture.trained import tensor_settings, trained_names
from gpt4moe.config.optimizer import Dtype, EngineKind
from gpt4moe.config.optimizer_table import OPTIMIZERS
from gpt4moe.config.run import RunConfig
from gpt4moe.parallel.layout import Layout
from gpt4moe.planner.gradient_buffers import GradientBuffer, PackedTensor, default_bucket_size, pack
from gpt4moe.planner.stacks import gradient_bytes, gradient_shares, has_one_fp8_weight, moment_bytes

VALUE_BYTES = {Dtype.bf16: 2, Dtype.fp32: 4}
"""Bytes of one element of a weight or an activation."""
GRADIENT_BYTES = 4
"""Bytes of one gradient element of the trainer: gradients are kept and reduced in fp32."""
FP8_COMPONENTS = (Component.attention, Component.dense_mlp, Component.experts, Component.shared_experts)
"""Whose matrices are multiplied in fp8."""
_STATE_BYTES = 4
"""Bytes of one element of a master: fp32."""
_STEP_BYTES = 4
"""Bytes of a step count. Megatron has one for each parameter, DeepSpeed one for each group."""
_ZERO_ALIGNMENT = 2
"""DeepSpeed pads a rank's part of a group to a multiple of this (0.19.8, runtime/zero/stage_1_and_2.py)."""


@dataclass(frozen=True, slots=True)
class RankStates:
    """States of the rank of a stage that holds the most, in bytes."""

    weights: int
    gradients: int
    optimizer: int
    """Optimizer states on the device; 0 if they are in host memory."""
    fullest: int
    """Index within the stage of the rank that holds the most; the first one if several hold equally much."""


@dataclass(frozen=True, slots=True)
class ChunkBuffers:
    """Megatron's gradient buffers of one virtual stage. Experts have separate ones, because other ranks reduce them."""

    dense: GradientBuffer
    expert: GradientBuffer

    @property
    def numel(self) -> int:
        return self.dense.numel + self.expert.numel


def owned_bytes(run: RunConfig) -> int:
    """Bytes of one element's optimizer states on the device of the rank that owns it; 0 if they are in host memory."""
    if run.engine.offload_optimizer:
        return 0
    # Under Megatron the master of an fp32 weight is the weight itself; DeepSpeed keeps a copy.
    has_master = run.engine.kind is not EngineKind.megatron or run.precision.dtype is not Dtype.fp32
    return _STATE_BYTES * has_master + moment_bytes(run) * len(OPTIMIZERS[run.optimizer.kind].states)


def fullest_states(run: RunConfig, layout: Layout, stage: int) -> RankStates:
    """States of the rank of a pipeline stage that holds the most. The layout must be legal."""
    found = _STATES[run.engine.kind](run, layout, stage)
    return replace(
        found, weights=found.weights - _spared_weights(run, stage),
        gradients=found.gradients // gradient_shares(run, layout),
    )  # fmt: skip


def _spared_weights(run: RunConfig, stage: int) -> int:
    """Bytes that weights of products need less than two bytes an element."""
    if not has_one_fp8_weight(run):
        return 0
    held = [tensor for chunk in chunk_tensors(run.model, run.parallel, stage) for tensor in chunk]
    return sum(t.local_size(run.parallel) for t in held if t.is_matrix and t.component in FP8_COMPONENTS)


def trained_tensors(run: RunConfig) -> frozenset[str] | None:
    """The names of what is trained; None: everything."""
    return trained_names(run.model, run.stage) if freezes(run) else None


def freezes(run: RunConfig) -> bool:
    """Whether stage.train or stage.lora leaves some weights frozen."""
    return bool(run.stage.train) or run.model.lora is not None


def frozen_bytes(run: RunConfig, stage: int) -> int:
    """Bytes of the frozen weights of a rank of one pipeline stage. They have no gradients and no optimizer states."""
    trained = trained_tensors(run)
    if trained is None:
        return 0
    held = [tensor for chunk in chunk_tensors(run.model, run.parallel, stage) for tensor in chunk]
    elements = sum(tensor.local_size(run.parallel) for tensor in held if tensor.name not in trained)
    return elements * VALUE_BYTES[run.precision.dtype]


def stage_buffers(run: RunConfig, layout: Layout, stage: int) -> list[ChunkBuffers]:
    """engine=megatron's gradient buffers of each virtual stage of one pipeline stage."""
    trained = trained_tensors(run)
    chunks = [
        [tensor for tensor in chunk if trained is None or tensor.name in trained]
        for chunk in chunk_tensors(run.model, run.parallel, stage)
    ]
    # Megatron cuts buffers into buckets only for overlapped reduction, and only on the first stage.
    buckets = stage == 0 and run.engine.overlap_grad_reduce
    size = (run.engine.bucket_size or default_bucket_size(layout.dp)) if buckets else None

    def packed(tensors: list[ModelTensor], is_expert: bool, ranks: int, size: int | None) -> GradientBuffer:
        return pack(
            (
                PackedTensor(t.local_size(run.parallel), _is_shared_embedding(run, t))
                for t in tensors
                if (t.spread is Spread.experts) is is_expert
            ),
            ranks,
            size,
        )

    sizes = [size] * layout.vpp + [None]  # the resampler has no buckets
    return [
        ChunkBuffers(packed(chunk, False, layout.dp * layout.cp, own), packed(chunk, True, layout.expert_dp, own))
        for chunk, own in zip(chunks, sizes, strict=False)
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
    return RankStates(
        numel * item + frozen_bytes(run, stage),
        numel * gradient_bytes(run),
        max(optimizer),
        optimizer.index(max(optimizer)),
    )


def _deepspeed_states(run: RunConfig, layout: Layout, stage: int) -> RankStates:
    """Under DeepSpeed all ranks of a stage hold equally much."""
    trained = trained_tensors(run)
    apart = tensor_settings(run.model, run.stage, run.optimizer)  # optimizer.by_pattern makes groups of their own
    groups: dict[tuple[str, str], tuple[int, int]] = {}  # name, pattern -> elements, ranks that share it
    for chunk in chunk_tensors(run.model, run.parallel, stage):
        for tensor in (it for it in chunk if trained is None or it.name in trained):
            name = _zero_group(run, tensor)
            key = name, apart[tensor.name].tensors if tensor.name in apart else ""
            size, _ = groups.get(key, (0, 0))
            ranks = layout.expert_dp if name == "experts" else layout.dp * layout.cp
            groups[key] = size + tensor.local_size(run.parallel), ranks
    cuts = [(-(-size // (_ZERO_ALIGNMENT * ranks)) * _ZERO_ALIGNMENT, ranks) for size, ranks in groups.values()]
    whole = sum(cut * ranks for cut, ranks in cuts)
    owned = sum(cut * owned_bytes(run) + _STEP_BYTES for cut, _ in cuts)
    return RankStates(
        whole * VALUE_BYTES[run.precision.dtype] + frozen_bytes(run, stage),
        whole * gradient_bytes(run),
        0 if run.engine.offload_optimizer else owned,
        fullest=0,
    )


def _zero_group(run: RunConfig, tensor: ModelTensor) -> str:
    """Name of the parameter group that training's DeepSpeed engine puts a tensor into."""
    if tensor.spread is Spread.experts:
        return "experts"
    if tensor.row.cut is Cut.everywhere:
        return "copied matrices" if len(tensor.shape) > 1 else "copied norms"
    if _is_shared_embedding(run, tensor):
        return "tied"
    return "matrices" if len(tensor.shape) > 1 else "norms"


def _is_shared_embedding(run: RunConfig, tensor: ModelTensor) -> bool:
    """Whether a tensor is a tied embedding on two stages. Both stages must cut it in the same way."""
    return run.model.tied_embeddings and run.parallel.pp > 1 and tensor.component is Component.embedding


_STATES = {EngineKind.megatron: _megatron_states, EngineKind.deepspeed: _deepspeed_states}

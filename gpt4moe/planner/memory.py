"""Memory of the fullest rank of each pipeline stage, line by line, in bytes.

    weights, gradients, optimizer   as the engine lays them out (states); equal to what is built, to the byte
    activations                     what autograd keeps of a micro-batch (activations), times the micro-batches that
                                    are live at the schedule's peak
    images                          of a vision model: encoder, pixels, latents, resampler (images)
    buffers                         messages between stages, and the workspace of the layer that needs most
    reserve                         no formula: the driver's context, NCCL's buffers, fragmentation

Stages are counted one by one, because they differ: in layers, in live micro-batches, and in the vocabulary, which only
the first and the last have. Ranks of one stage differ in what their optimizers own: the last ranks own the padding.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from operator import sub
from typing import TypeVar

from gpt4moe.config.beyond import Dispatch
from gpt4moe.config.cluster import Generation
from gpt4moe.config.model import AttentionKind, MlpKind
from gpt4moe.config.optimizer import Dtype
from gpt4moe.config.parallel import Recompute
from gpt4moe.config.plan import DEFAULT_IMBALANCE, beyond_of
from gpt4moe.config.run import RunConfig
from gpt4moe.parallel.layout import Layout
from gpt4moe.parallel.placement import rank_chunks, stage_layers
from gpt4moe.pipeline.schedule import virtual_order, warmup_forwards
from gpt4moe.planner.activations import embedding_activations, head_activations, layer_bytes, mask_bytes
from gpt4moe.planner.images import image_memory
from gpt4moe.planner.micro_batch import FLOAT, MicroBatch
from gpt4moe.planner.stacks import kernels_of
from gpt4moe.planner.states import RankStates, fullest_states

CONTEXT_BYTES = 2_000_000_000
"""Bytes of a GPU's driver context and NCCL's buffers: an assumption."""
Value = TypeVar("Value")
KnownStates = dict[int, RankStates]
"""Cache: stage -> its states. Of several equal stages only the first has an entry."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageMemory:
    """Bytes of the rank of one pipeline stage that holds the most."""

    stage: int
    rank: int
    """Global rank; the first one if several hold equally much."""
    weights_bytes: int
    gradients_bytes: int
    """fp32 gradients."""
    optimizer_bytes: int
    """fp32 masters (of bf16 weights), both moments, step counts; 0 if they are in host memory."""
    activations_bytes: int
    images_bytes: int = 0
    """Of a vision model: encoder, pixels, latents and their gradients, what the resampler keeps (planner.images)."""
    buffers_bytes: int
    reserve_bytes: int

    @property
    def total_bytes(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self) if field.name.endswith("_bytes"))

    @property
    def states_bytes(self) -> int:
        return self.weights_bytes + self.gradients_bytes + self.optimizer_bytes


def memory_per_stage(
    run: RunConfig, layout: Layout, *, imbalance: float = DEFAULT_IMBALANCE, known: "KnownStates | None" = None
) -> list[StageMemory]:
    """The fullest rank of every stage of a legal layout: [pp].

    Args:
        imbalance: rows at the fullest rank's experts, divided by an even share; 1.0 or more. No effect at ep 1.
        known: cache, for calls with the same model, engine, precision and degrees; this call adds to it.
    """
    micro = MicroBatch.of(run, layout, imbalance)
    alike = alike_stages(run, layout)
    live = live_activations(run, layout, micro)
    passing = peak_live_bytes(run, layout, _of_each(alike, lambda stage: _kept_messages(run, layout, micro, stage)))
    workspaces = _of_each(alike, lambda stage: _workspace(run, layout, micro, stage))
    states = {} if known is None else known
    images, stages = image_memory(run, layout, micro), []
    for stage, like in enumerate(alike):
        if like not in states:
            states[like] = fullest_states(run, layout, like)
        held = states[like]
        buffers = passing[stage] + workspaces[stage]
        if images is not None:  # the encoder runs before the schedule, in the memory that this takes later
            buffers = max(buffers, images.passing - live[stage])
        stages.append(StageMemory(
            stage=stage,
            rank=stage * layout.stage_size + held.fullest,
            weights_bytes=held.weights,
            gradients_bytes=held.gradients,
            optimizer_bytes=held.optimizer,
            activations_bytes=live[stage],
            images_bytes=0 if images is None else images.held_bytes,
            buffers_bytes=buffers,
            reserve_bytes=reserve_bytes(run, live[stage] + buffers),
        ))  # fmt: skip
    return stages


def reserve_bytes(run: RunConfig, moving_bytes: float) -> int:
    """Reserve in bytes; 0 on a CPU. Args: moving_bytes: activations and buffers, a share of which is fragmentation."""
    return (
        0
        if run.cluster.generation is Generation.cpu
        else CONTEXT_BYTES + int(kernels_of(run).fragmentation * moving_bytes)
    )


def alike_stages(run: RunConfig, layout: Layout) -> list[int]:
    """For each stage, the first stage equal to it: same kinds of layers, same embedding and output layer."""
    chunks, kinds = stage_layers(run.model.num_layers, run.parallel), run.model.layer_kinds
    first: dict[tuple[object, ...], int] = {}
    has_patterns = bool(run.stage.train or run.stage.lora.targets)  # which may be of some layers alone
    gated = run.model.has_gated_block
    return [
        first.setdefault(
            (stage == 0, stage == layout.pp - 1, stage if has_patterns else None, *(
                tuple((kinds[layer], gated(layer)) for layer in layers) for layers in chunks[stage :: layout.pp]
            )),
            stage,
        )
        for stage in range(layout.pp)
    ]  # fmt: skip


def _of_each(alike: list[int], value: Callable[[int], Value]) -> list[Value]:
    """The value of every stage, computed once for equal stages."""
    known = {stage: value(stage) for stage in set(alike)}
    return [known[stage] for stage in alike]


def live_activations(run: RunConfig, layout: Layout, micro: MicroBatch) -> list[int]:
    """Bytes that autograd keeps at the peak of each pipeline stage, masks included: [pp]."""
    alike = alike_stages(run, layout)
    kept = _of_each(alike, lambda stage: chunk_activations(run, layout, micro, stage))
    again = _of_each(alike, lambda stage: again_bytes(run, layout, micro, stage))
    twice = _of_each(alike, lambda stage: _overlapped_bytes(run, micro, stage))
    live = peak_live_bytes(run, layout, kept)
    return [sum(parts) + mask_bytes(micro) for parts in zip(live, again, twice, strict=True)]


def _overlapped_bytes(run: RunConfig, micro: MicroBatch, stage: int) -> int:
    """Bytes that an overlapped dispatch keeps more: its forward pass keeps a layer's activations before the backward
    pass beside it has freed those of another layer."""
    if beyond_of(run).dispatch is not Dispatch.overlapped:
        return 0
    layers = [layer for chunk in rank_chunks(run.model.num_layers, run.parallel, stage) for layer in chunk]
    return max(layer_bytes(micro, layer, run.parallel.recompute) for layer in layers)


def peak_live_bytes(run: RunConfig, layout: Layout, kept: list[list[int]]) -> list[int]:
    """Bytes of activations that each pipeline stage holds at the peak of its schedule: [pp].

    Equals schedule.peak_live, without building the table. Before a rank's k-th forward pass, k - 1 forward passes have
    kept activations, and k - 1 - warm-up backward passes have freed theirs.

    Args:
        kept: bytes of one micro-batch in each virtual stage of each pipeline stage: [pp][vpp].
    """
    micro_batches = run.training.global_batch_size // (run.training.micro_batch_size * layout.dp)
    enough = min(micro_batches, 3 * layout.pp)  # more micro-batches do not raise the peak
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
    """Bytes that one micro-batch keeps in each virtual stage of a pipeline stage: [vpp]."""
    kept = []
    for vp_stage, layers in enumerate(rank_chunks(run.model.num_layers, run.parallel, stage)):
        whole = sum(layer_bytes(micro, layer, recompute_of(run, place)) for place, layer in enumerate(layers))
        parts = []
        if micro.fused_rotary or Recompute.full in {recompute_of(run, place) for place in range(len(layers))}:
            parts.append({"rotary": micro.sequence * run.model.head_size * FLOAT})  # one table for all layers
        if stage == 0 and vp_stage == 0:
            parts.append(embedding_activations(micro))
        if stage == layout.pp - 1 and vp_stage == layout.vpp - 1:
            parts.append(head_activations(micro))
        kept.append(whole + sum(sum(part.values()) for part in parts))
    return kept


def recompute_of(run: RunConfig, place: int) -> Recompute:
    """Recomputation of the layer at index `place` of its virtual stage; recompute_layers limits it to the first."""
    limit = run.parallel.recompute_layers
    return Recompute.none if limit is not None and place >= limit else run.parallel.recompute


def again_bytes(run: RunConfig, layout: Layout, micro: MicroBatch, stage: int) -> int:
    """Bytes of activations that the backward pass of one recomputed layer restores; the maximum over a stage's layers.

    On the last stage the head has freed its activations by then, so they are subtracted.
    """
    most = 0
    whole = replace(micro, modules=frozenset(), sums={}) if micro.modules else micro
    for layers in rank_chunks(run.model.num_layers, run.parallel, stage):
        for place, layer in enumerate(layers):
            gone = layer_bytes(whole, layer) - layer_bytes(micro, layer, recompute_of(run, place))
            most = max(most, gone)
    head = sum(head_activations(micro).values()) if stage == layout.pp - 1 else 0
    return max(0, most - head)


def _kept_messages(run: RunConfig, layout: Layout, micro: MicroBatch, stage: int) -> list[int]:
    """Bytes of inputs and outputs that the schedule keeps for one live micro-batch, by virtual stage: [vpp]."""
    last = layout.pp * layout.vpp - 1
    # A fused norm keeps the input itself (an activation, counted there). The unfused norm keeps a copy of a bf16 input.
    has_copy = not (micro.fused_norm or run.precision.dtype is Dtype.fp32)
    places, keeps = range(stage, last + 1, layout.pp), not micro.kernels.frees_outputs
    return [micro.hidden_bytes * (keeps * (place < last) + (place > 0 and has_copy)) for place in places]


def _workspace(run: RunConfig, layout: Layout, micro: MicroBatch, stage: int) -> int:
    """Bytes of temporaries: those of the stage's largest layer or head (they run one after another), and two messages.

    The formulas follow the code and were not measured: torch's allocator decides how long a temporary lives.
    """
    layers = [layer for chunk in rank_chunks(run.model.num_layers, run.parallel, stage) for layer in chunk]
    largest = max(layer_workspace(micro, layer) for layer in layers)
    if stage == layout.pp - 1:
        largest = max(largest, head_workspace(micro))
    return largest + (2 * micro.hidden_bytes if layout.pp > 1 else 0)


def layer_workspace(micro: MicroBatch, layer: int) -> int:
    """Bytes of temporaries of a layer: the larger of attention and MLP, which run one after another."""
    kind = micro.kinds[layer]
    return max(ATTENTION_WORKSPACE[kind.attention](micro), MLP_WORKSPACE[kind.mlp](micro))


def head_workspace(micro: MicroBatch) -> int:
    """The logits' gradient in the model's dtype; gathered input and its gradient; the weight's gradient.

    What the loss keeps counts as activations. Megatron's probabilities in fp32 become the gradient of fp32 logits in
    place; one kernel each way makes it beside the logits.
    """
    vocabulary, hidden = micro.model.vocab_size // micro.layout.tp, micro.model.hidden_size
    logits = micro.tokens * vocabulary * micro.item if micro.fused_loss or micro.item != FLOAT else 0
    return logits + (2 * micro.tokens + vocabulary) * hidden * micro.item


def expert_workspace(micro: MicroBatch) -> int:
    """The larger of two peaks.

    Dispatch: rows sent, received and sorted. The experts' backward pass: gradients of the activation, and six fp32
    copies of it unless one kernel makes them; weight gradients before they are added to the main gradients.
    """
    model, moe, rows, item = micro.model, micro.model.moe, micro.expert_rows, micro.item
    assert moe is not None
    hidden, ffn = model.hidden_size, moe.ffn_hidden_size // micro.layout.etp
    sent = micro.layout.etp * micro.split_tokens * moe.top_k
    moving = (sent + 2 * rows) * hidden * item
    # Grouped products make the weight gradients of all experts at once, the loop one expert at a time.
    at_once = rows if micro.grouped else -(-rows // micro.local_experts)
    copies = 0 if micro.fused_swiglu else 6 * FLOAT
    activation = at_once * ffn * (copies + 3 * item) + 2 * rows * hidden * item
    weights = micro.local_experts * hidden * ffn * item * (2 if micro.grouped else 3)
    return max(moving, activation + weights)


def dense_workspace(micro: MicroBatch) -> int:
    """Gathered input and its gradient; gradients of the inner activations and of one weight."""
    hidden, ffn = micro.model.hidden_size, (micro.model.ffn_hidden_size or 0) // micro.layout.tp
    return (2 * micro.tokens * hidden + micro.tokens * 4 * ffn + 2 * ffn * hidden) * micro.item


def attention_workspace(micro: MicroBatch) -> int:
    """Gathered input and its gradient; gradients of queries, keys, values and output; gradient of the qkv weight."""
    model, tp = micro.model, micro.layout.tp
    width = (2 * model.num_attention_heads + 2 * model.query_groups) * model.head_size // tp
    return (2 * micro.tokens * model.hidden_size + 2 * micro.tokens * width + width * model.hidden_size) * micro.item


ATTENTION_WORKSPACE: dict[AttentionKind, Callable[[MicroBatch], int]] = {
    AttentionKind.grouped_query: attention_workspace,
    AttentionKind.latent: attention_workspace,
}
MLP_WORKSPACE: dict[MlpKind, Callable[[MicroBatch], int]] = {
    MlpKind.dense: dense_workspace,
    MlpKind.moe: expert_workspace,
}

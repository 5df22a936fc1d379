"""Seconds of one optimizer step: slowest pipeline stage, bubble, data-parallel communication, optimizer.

    layer_time -> seconds of a stage for one micro-batch (t) -> x micro-batches (m)
    + bubble t (pp - 1) / vpp + messages between stages + gradients and weights over dp + optimizer = a step

The sum follows arXiv:2104.04473, section 2.2. A test compares the bubble with pipeline.schedule, slot by slot.
"""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache

from gpt4moe.architecture.count import chunk_tensors
from gpt4moe.architecture.rows import Component, Spread
from gpt4moe.architecture.tensors import ModelTensor, embedding_tensors, output_tensors, resampler_tensors
from gpt4moe.config.beyond import overlap_problem
from gpt4moe.config.parallel import ParallelConfig, Recompute
from gpt4moe.config.training import TrainingConfig
from gpt4moe.parallel.placement import stage_sizes
from gpt4moe.pipeline.schedule import warmup_forwards
from gpt4moe.planner.efficiency import RING_SHARE
from gpt4moe.planner.image_time import image_seconds
from gpt4moe.planner.layer_time import HIDDEN, LAYER_PARTS, head_seconds, layer_seconds, link_rate
from gpt4moe.planner.run_time import HOST_COPY_RATE
from gpt4moe.planner.work import TimedKind, Work

STEP_PARTS = (*LAYER_PARTS, "pp", "bubble", "dp", "optimizer")
HOST_MEMORY_RATE = 41e9
"""Bytes per second of host memory for each device: an assumption, 80% of an eighth of 410 GB/s (two sockets with eight
channels of DDR4-3200, as a DGX A100 has)."""


@dataclass(frozen=True, slots=True)
class StepTime:
    """Time of one step, as the slowest stage determines it."""

    parts: dict[str, float]
    """Seconds by part (STEP_PARTS, and `images` of a vision model). Their sum is the time of the step."""
    stages: list[float]
    """Seconds of each stage for one micro-batch, forward and backward: [pp]."""
    micro_batches: int

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())


def step_time(
    work: Work, training: TrainingConfig, world_size: int, *, balanced: bool = False,
    heaviest: tuple[float, float] | None = None, known: "KnownSeconds | None" = None,
) -> StepTime:  # fmt: skip
    """One step of a legal layout.

    Args:
        heaviest: the result of heaviest_stage(work), if the caller has it.
        known: cache of stage times, for calls with the same model, cluster and imbalance; this call adds to it.
        balanced: True: every stage takes the mean time. For published runs that do not state which layers each stage
            has. False: the slowest stage determines the step.
    """
    parallel = work.parallel
    dp = world_size // (parallel.tp * parallel.cp * parallel.pp)
    micro_batches = training.global_batch_size // (work.micro_batch_size * dp)
    stages = stage_parts(work, {} if known is None else known)
    sums = {id(stage): sum(stage[part] for part in LAYER_PARTS) for stage in stages}
    totals = [sums[id(stage)] for stage in stages]
    busiest = stages[max(range(parallel.pp), key=totals.__getitem__)]
    if balanced:
        busiest = {part: sum(stage[part] for stage in stages) / parallel.pp for part in busiest}
        totals = [sum(totals) / parallel.pp] * parallel.pp
    pace = sum(busiest[part] for part in LAYER_PARTS)
    parts = {part: micro_batches * busiest[part] for part in LAYER_PARTS}
    parts["ep"] -= overlapped(work, micro_batches) * busiest[HIDDEN]
    parts["pp"] = message_seconds(work) * 2 * parallel.vpp * micro_batches if parallel.pp > 1 else 0.0
    if work.model.vision is not None:
        parts["images"] = image_seconds(work, micro_batches)
    parts["bubble"] = pace * (parallel.pp - 1) / parallel.vpp
    parts.update(after_seconds(work, world_size, pace, heaviest or heaviest_stage(work)))
    return StepTime(parts, totals, micro_batches)


def overlapped(work: Work, micro_batches: int) -> float:
    """Micro-batches of a step in which rows travel while another micro-batch computes; 0: the stack hides nothing.

    A forward pass hides behind another one's backward pass. So the first and the last stand alone; interleaved, all of
    the last rank's warm-up, which is one forward pass longer than without (Megatron-core 0.16.1, combined_1f1b.py and
    schedules.py). In the bubble nothing is hidden either.
    """
    cut = work.parallel
    if not work.efficiency.hides_experts or overlap_problem(cut) is not None:
        return 0.0
    warmup = warmup_forwards(cut.pp - 1, pp=cut.pp, vpp=cut.vpp, micro_batches=micro_batches)
    return max(0.0, micro_batches - (1 + warmup) / cut.vpp)


KnownSeconds = dict[tuple[object, ...], dict[str, float]]
"""Cache. Key: kind of layer (its id) or head, degrees that layer_time reads, recomputation. Value: seconds by part."""


def stage_parts(work: Work, known: KnownSeconds) -> list[dict[str, float]]:
    """Seconds of one micro-batch through all virtual stages of each pipeline rank, by part (and HIDDEN): [pp].

    Stages with the same layers share one dictionary.
    """
    cut = work.parallel
    asked = (cut.tp, cut.cp, cut.ep, cut.etp, cut.sequence_parallel_on, work.micro_batch_size)
    stages = _kinds_of_stages(work)
    distinct = {id(stage): stage for stage in stages}
    seconds: dict[tuple[int, bool], dict[str, float]] = {}
    for key in {key for stage in distinct.values() for key in stage}:
        name = (key[0], *asked, cut.recompute if key[1] else Recompute.none)
        if name not in known:
            kind = next(kind for kind in work.kinds if id(kind) == key[0])
            known[name] = layer_seconds(work, kind, recomputes=key[1])
        seconds[key] = known[name]
    of_stage = {
        name: {part: sum(count * seconds[key][part] for key, count in stage.items()) for part in (*LAYER_PARTS, HIDDEN)}
        for name, stage in distinct.items()
    }
    if ("head", *asked) not in known:
        known["head", *asked] = head_seconds(work)
    parts, head = [of_stage[id(stage)] for stage in stages], known["head", *asked]
    parts[-1] = {part: value + head.get(part, 0.0) for part, value in parts[-1].items()}
    return parts


def _kinds_of_stages(work: Work) -> list[Counter[tuple[int, bool]]]:
    """For each pipeline rank: (id of a layer kind, whether it is recomputed) -> number of such layers."""
    sizes = tuple(stage_sizes(work.model.num_layers, work.parallel))
    most = work.parallel.recompute_layers or work.model.num_layers
    return _counted(tuple(map(id, work.kinds)), sizes, work.parallel.pp, most)


@lru_cache(maxsize=4096)
def _counted(kinds: tuple[int, ...], sizes: tuple[int, ...], pp: int, most: int) -> list[Counter[tuple[int, bool]]]:
    """As _kinds_of_stages; cached, because a search varies the other degrees. Equal stages are one object."""
    counts: list[Counter[tuple[int, bool]]] = [Counter() for _ in range(pp)]
    start = 0
    for chunk, size in enumerate(sizes):
        counts[chunk % pp].update((kinds[start + place], place < most) for place in range(size))
        start += size
    first: dict[frozenset[tuple[tuple[int, bool], int]], Counter[tuple[int, bool]]] = {}
    return [first.setdefault(frozenset(stage.items()), stage) for stage in counts]


def message_seconds(work: Work) -> float:
    """Seconds to send an activation to the next stage, or its gradient back, as far as computation does not hide it."""
    sent = work.value_bytes * work.rank_tokens * work.model.hidden_size
    # Ranks of neighbouring stages are a whole stage of ranks apart, so messages use the fabric.
    return work.efficiency.exposed * sent / (RING_SHARE * work.cluster.fabric_bytes_per_second)


def after_seconds(work: Work, world_size: int, pace: float, heaviest: tuple[float, float]) -> dict[str, float]:
    """Seconds after the last micro-batch, by part: data-parallel communication that nothing hides; optimizer update.

    A chunk's gradients are reduced after its last micro-batch, while that micro-batch passes the rank's other chunks.
    With one chunk, they are reduced during the last pass itself. Weights are gathered before the first forward pass of
    their chunk.
    """
    parallel = work.parallel
    stage = world_size // parallel.pp
    reduced = gathered = update = 0.0
    dense, expert = heaviest
    dense += trained_resampler(work)
    for size, copies in ((dense, stage // parallel.tp), (expert, stage // (parallel.ep * parallel.etp))):
        seconds = size * (copies - 1) / copies / link_rate(work.cluster, stage)
        reduced += work.efficiency.gradient_bytes * seconds
        gathered += work.value_bytes * seconds
        update += size / copies * update_seconds(work)
    passes = (parallel.pp * (parallel.vpp - 1) + 1) / parallel.vpp
    exposed = max(0.0, reduced - passes * pace * 2 / 3) + max(0.0, gathered - passes * pace / 3)
    return {"dp": exposed, "optimizer": update}


def update_seconds(work: Work) -> float:
    """Seconds of the update of one parameter that a rank owns. Offloaded: the gradient to the host, the update there,
    the weight back; nothing of it is hidden."""
    moved = update_bytes(work)
    if not work.offloads:
        return moved / work.memory_rate
    return (work.gradient_bytes + work.value_bytes) / HOST_COPY_RATE + moved / HOST_MEMORY_RATE


def update_bytes(work: Work) -> int:
    """Memory traffic of AdamW for one parameter. Reads gradient, master (fp32) and two moments, writes master and two
    moments, and writes the bf16 weight: 30 where all are fp32."""
    return work.gradient_bytes + 8 + 4 * work.moment_bytes + 2


def heaviest_stage(work: Work) -> tuple[float, float]:
    """(dense, expert) trained parameters of one rank of the stage that has the most of them, without the resampler."""
    return max(stage_parameters(work, trained=work.trained), key=sum)


def trained_resampler(work: Work) -> int:
    """Trained parameters of the resampler, whole on every rank of every stage; 0 of a text model."""
    tensors = resampler_tensors(work.model)
    return sum(tensor.size for tensor in tensors if work.trained is None or tensor.name in work.trained)


def stage_parameters(work: Work, *, trained: Collection[str] | None = None) -> list[tuple[float, float]]:
    """(dense, expert) parameters of one rank of each stage: [pp]. A tied embedding counts on the first stage only, the
    resampler on none.

    Args:
        trained: only of these; None: all.
    """
    if trained is not None:
        return _trained_parameters(work, trained)
    of_kind = {id(kind): kind_sizes(kind, work.parallel) for kind in {id(kind): kind for kind in work.kinds}.values()}
    counts = _kinds_of_stages(work)
    sizes = {
        name: [sum(count * of_kind[kind][which] for (kind, _), count in stage.items()) for which in (0, 1)]
        for name, stage in {id(stage): stage for stage in counts}.items()
    }
    stages = [sizes[id(stage)] for stage in counts]
    ends = [0] * len(stages)
    ends[0] += _local(embedding_tensors(work.model), work.parallel)
    ends[-1] += _local(output_tensors(work.model), work.parallel)
    return [(dense + end, expert) for (dense, expert), end in zip(stages, ends, strict=True)]


def _trained_parameters(work: Work, trained: Collection[str]) -> list[tuple[float, float]]:
    stages, tied = [], work.model.tied_embeddings
    for stage in range(work.parallel.pp):
        chunks = chunk_tensors(work.model, work.parallel, stage)[: work.parallel.vpp]
        tensors = [tensor for chunk in chunks for tensor in chunk if tensor.name in trained]
        if tied and stage > 0:
            tensors = [tensor for tensor in tensors if tensor.component is not Component.embedding]
        expert = _local([tensor for tensor in tensors if tensor.spread is Spread.experts], work.parallel)
        stages.append((float(_local(tensors, work.parallel) - expert), float(expert)))
    return stages


def kind_sizes(kind: TimedKind, parallel: ParallelConfig) -> tuple[int, int]:
    """(dense, expert) parameters of one layer on one rank."""
    expert = _local([tensor for tensor in kind.tensors if tensor.spread is Spread.experts], parallel)
    return _local(list(kind.tensors), parallel) - expert, expert


def _local(tensors: list[ModelTensor], parallel: ParallelConfig) -> int:
    return sum(tensor.local_size(parallel) for tensor in tensors)

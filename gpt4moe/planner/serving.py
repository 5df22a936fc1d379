"""Decoding: latency and throughput of generated tokens, bytes of weights and cache, price of tokens.

    reading weights and cache | matrix products | sums over tp, all-to-all over ep -> time of one stage for one group
    latency of a token = sum over the stages; throughput of a full pipeline = one group in the time of one stage

For each token, decoding reads once every weight that the batch uses. So memory bandwidth is the bottleneck until the
batch is large. Prompts before it: prefill.py. Curves, prices and the search of layouts: inference.py.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

from gpt4moe.architecture.cache import cached_elements, rank_cache_bytes
from gpt4moe.architecture.flops import window_of
from gpt4moe.architecture.rows import Component, Spread
from gpt4moe.architecture.table import ATTENTION
from gpt4moe.architecture.tensors import ModelTensor, embedding_tensors, output_tensors
from gpt4moe.config.cluster import ClusterConfig
from gpt4moe.config.model import ModelConfig
from gpt4moe.config.parallel import ParallelConfig
from gpt4moe.parallel.placement import stage_layers
from gpt4moe.planner.efficiency import MEMORY_SHARE, planning_profile
from gpt4moe.planner.layer_time import all_to_all_seconds, link_rate
from gpt4moe.planner.run_time import hourly_price
from gpt4moe.planner.work import TimedKind, Work, timed_kinds

SERVED_VALUE_BYTES = 2
"""Bytes of one element of activations and of the cache: bf16. Weights too, except with fp8."""
ALL_REDUCE_SECONDS = 10e-6
"""Seconds of one small all-reduce over NVLink, or of one message between stages: an assumption."""
ALL_TO_ALL_SECONDS = 20e-6
"""Seconds of one small all-to-all, before its bytes: an assumption. DeepEP's low-latency kernels, whose bytes alone
take some 70 of them, take 77e-6 (its README, H800, 8 ranks, 128 tokens)."""
MEMORY_USED = 0.9
"""Share of a device's memory for weights and cache: an assumption, vLLM's default (gpu_memory_utilization). The rest
is for activations, the driver's context and NCCL."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServingLayout:
    """Copies of a model, each on tp x pp devices."""

    tp: int
    """Devices that share each stage. As in the files of to-inference, each has whole experts."""
    pp: int
    copies: int = 1
    sharing: int = 1
    """Copies whose stages divide the experts among them; a divisor of copies."""

    @property
    def ep(self) -> int:
        """Ranks that divide the experts of a layer."""
        return self.tp * self.sharing

    @property
    def devices(self) -> int:
        return self.tp * self.pp * self.copies


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """A model as a cluster serves it."""

    model: ModelConfig
    cluster: ClusterConfig
    is_fp8: bool = False
    """Weights are stored and multiplied in fp8. All of them, though real exports keep a few percent in bf16."""
    imbalance: float = 1.0
    """Rows that the busiest expert-parallel rank gets, divided by the mean."""

    @cached_property
    def kinds(self) -> list[TimedKind]:
        return timed_kinds(self.model)

    @property
    def weight_bytes(self) -> int:
        """Of one weight."""
        return 1 if self.is_fp8 else SERVED_VALUE_BYTES

    @property
    def matrix_peak(self) -> float:
        return (self.is_fp8 and self.cluster.peak_flops_fp8) or self.cluster.peak_flops_bf16

    def work(self, layout: ServingLayout, num_tokens: int) -> Work:
        """The input of layer_time for a forward pass of so many tokens of each copy."""
        return Work(
            model=replace(self.model, seq_length=num_tokens), kinds=self.kinds, micro_batch_size=1,
            parallel=ParallelConfig(tp=layout.tp, ep=layout.ep if self.model.moe else 1), cluster=self.cluster,
            efficiency=planning_profile(self.cluster.generation), matrix_peak=self.matrix_peak,
            imbalance=self.imbalance if layout.ep > 1 else 1.0,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Serving:
    """Decoding of one model with a number of sequences in flight."""

    devices: int
    sequences: int
    """In flight in each copy."""
    context: int
    """Tokens in the cache of each sequence."""
    weight_bytes: float
    """Bytes of weights on the fullest device."""
    cache_bytes_per_token: float
    """Cache bytes of one token of one sequence, over all devices of a copy, without repeated latents.

    For layers with an attention window: the mean over the context.
    """
    cache_bytes: float
    """Bytes of the cache on the fullest device."""
    latency_seconds: float
    """Seconds from one token of a sequence to its next one."""
    tokens_per_second: float
    """Tokens per second of all sequences of all copies together, with all devices busy."""

    def usd_per_1000_tokens(self, cluster: ClusterConfig, utilisation: float = 1.0) -> float:
        """Price of 1,000 tokens. Raises: ConfigError if the cluster has no price.

        Args: utilisation: share of the throughput that requests use; an assumption.
        """
        hours = device_hours(1000, self.devices, self.tokens_per_second * utilisation)
        return hourly_price(cluster) * hours


def device_hours(num_tokens: float, devices: int, tokens_per_second: float) -> float:
    """Hours of all devices that tokens take at this rate."""
    return devices * num_tokens / tokens_per_second / 3600


def usd_per_tokens(num_tokens: float, devices: int, tokens_per_second: float, cluster: ClusterConfig) -> float | None:
    """Price of tokens at this rate; None: the cluster has no price."""
    hours = device_hours(num_tokens, devices, tokens_per_second)
    return None if cluster.usd_per_hour is None else cluster.usd_per_hour * hours


@dataclass(frozen=True, slots=True)
class Stage:
    """What a pipeline stage has. Stages that have the same are equal."""

    kinds: tuple[tuple[int, int], ...]
    """(first layer of a kind in the model, number of layers of that kind in this stage)"""
    is_first: bool
    is_last: bool


def stages_of(served: ServedModel, pp: int) -> list[Stage]:
    """The stages, in order; they may be uneven: 120 layers over 16 stages are eight of 8 and eight of 7."""
    first: dict[int, int] = {}
    for layer, kind in enumerate(served.kinds):
        first.setdefault(id(kind), layer)
    counts = [
        Counter(first[id(served.kinds[layer])] for layer in layers)
        for layers in stage_layers(served.model.num_layers, ParallelConfig(pp=pp))
    ]
    return [Stage(tuple(sorted(c.items())), index == 0, index == pp - 1) for index, c in enumerate(counts)]


def serve(served: ServedModel, layout: ServingLayout, *, sequences: int, context: int) -> Serving:
    """Decoding with `sequences` in flight in each copy. They form pp groups that follow each other through the
    pipeline. Messages between stages take their latency; their bytes are hidden behind computation."""
    group = max(1.0, sequences / layout.pp)
    stages = stages_of(served, layout.pp)
    of_stage = {stage: _stage_seconds(served, layout, stage, group, context) for stage in {*stages}}
    seconds = [of_stage[stage] for stage in stages]
    total, slowest, is_full = sum(seconds), max(seconds), sequences >= layout.pp
    return Serving(
        devices=layout.devices, sequences=sequences, context=context,
        weight_bytes=max(stage_weight_bytes(served, layout, stage) for stage in of_stage),
        cache_bytes_per_token=cache_bytes(served.model, context) / context,
        cache_bytes=sequences * max(_stage_cache(served, layout, stage, context) for stage in of_stage),
        latency_seconds=max(total, layout.pp * slowest if is_full else 0.0),
        tokens_per_second=layout.copies * (group / slowest if is_full else sequences / total),
    )  # fmt: skip


def _stage_seconds(served: ServedModel, layout: ServingLayout, stage: Stage, group: float, context: int) -> float:
    model, cluster = served.model, served.cluster
    work = served.work(layout, 1)
    read = operations = wire = 0.0
    for layer, count in stage.kinds:
        layer_read, layer_operations = _used(served, layout, served.kinds[layer].tensors, group)
        read += count * layer_read
        operations += count * (layer_operations + group / layout.tp * _attention_operations(model, layer, context))
        wire += count * _wire_seconds(work, layout, served.kinds[layer], group)
    if stage.is_last:
        head_read, head_operations = _used(served, layout, output_tensors(model), group)
        read, operations = read + head_read, operations + head_operations
    moved = served.weight_bytes * read + group * _stage_cache(served, layout, stage, context)
    peak = served.matrix_peak * work.efficiency.matrix
    busy = max(moved / (cluster.memory_bytes_per_second * MEMORY_SHARE), operations / peak)
    return busy + wire + ALL_REDUCE_SECONDS * (layout.pp > 1)


def _used(
    served: ServedModel, layout: ServingLayout, tensors: Iterable[ModelTensor], group: float
) -> tuple[float, float]:
    """(weights that a rank reads, its FLOP) for one token of each sequence of a group in each sharing copy."""
    read = operations = 0.0
    for tensor in tensors:
        size, rows, met = held_size(tensor, layout), group, 1.0
        if tensor.spread is Spread.experts:
            assert served.model.moe is not None
            active = served.model.moe.top_k / served.model.moe.num_experts
            met = 1 - (1 - active) ** (group * layout.sharing)  # only experts that some token chose are read
            rows = active * group * layout.sharing * (served.imbalance if layout.ep > 1 else 1.0)
        read += size * met
        operations += 2 * size * rows if tensor.is_matrix else 0
    return read, operations


def _wire_seconds(work: Work, layout: ServingLayout, kind: TimedKind, group: float) -> float:
    """Seconds that one layer waits for other ranks.

    A sum over tp follows attention, and one the MLP. Where copies share experts, rows travel to them and back instead:
    each tensor-parallel rank sends its part of the tokens.
    """
    row = SERVED_VALUE_BYTES * work.model.hidden_size
    shares = layout.sharing > 1 and kind.layer_kind.has_experts
    is_cut = any(t.spread is Spread.tp and t.component is not Component.attention for t in kind.tensors)
    sums = (2 if is_cut or not shares else 1) * (layout.tp > 1)
    seconds = sums * (ALL_REDUCE_SECONDS + 2 * row * group / link_rate(work.cluster, layout.tp))
    if shares and work.model.moe is not None:
        sent = 2 * row * group / layout.tp * work.model.moe.top_k * (layout.ep - 1) / layout.ep
        seconds += 2 * ALL_TO_ALL_SECONDS + all_to_all_seconds(work, sent * work.imbalance)
    return seconds


def held_size(tensor: ModelTensor, layout: ServingLayout) -> int:
    """Elements of a tensor that a rank of its stage holds, as in the files of to-inference."""
    return tensor.size // {Spread.whole: 1, Spread.tp: layout.tp, Spread.experts: layout.ep}[tensor.spread]


def stage_weight_bytes(served: ServedModel, layout: ServingLayout, stage: Stage) -> int:
    """Bytes of weights of one rank of a stage."""
    tensors = [(tensor, count) for layer, count in stage.kinds for tensor in served.kinds[layer].tensors]
    tensors += [(tensor, 1) for tensor in output_tensors(served.model)] if stage.is_last else []
    embeds = stage.is_first or (stage.is_last and served.model.tied_embeddings)
    tensors += [(tensor, 1) for tensor in embedding_tensors(served.model)] if embeds else []
    return served.weight_bytes * sum(count * held_size(tensor, layout) for tensor, count in tensors)


def _stage_cache(served: ServedModel, layout: ServingLayout, stage: Stage, context: int) -> int:
    """Bytes of the cache of one sequence on one rank of a stage."""
    of_kinds = {
        layer: rank_cache_bytes(served.model, [layer], num_tokens=context, tp=layout.tp, value_bytes=SERVED_VALUE_BYTES)
        for layer, _ in stage.kinds
    }
    return sum(count * of_kinds[layer] for layer, count in stage.kinds)


def cache_bytes(model: ModelConfig, context: int) -> float:
    """Cache bytes of one sequence of `context` tokens, without copies on other ranks."""
    return sum(SERVED_VALUE_BYTES * cached_elements(model, layer, context) for layer in range(model.num_layers))


def _attention_operations(model: ModelConfig, layer: int, context: int) -> float:
    """FLOP of scores and weighted values of one new token. Latent attention computes them on the latent itself."""
    width = ATTENTION[model.layer_kinds[layer].attention].decoding_width(model)
    return 2.0 * model.num_attention_heads * width * min(context, window_of(model, layer) or context)


def with_query_groups(model: ModelConfig, groups: int) -> ModelConfig:
    """The model with another number of query groups: all heads (multi-head), fewer, or one (multi-query)."""
    return replace(model, num_query_groups=groups)


def most_sequences(served: ServedModel, layout: ServingLayout, *, context: int) -> int:
    """The most sequences of a copy whose caches fit beside the weights, in MEMORY_USED of the memory."""
    rooms = []
    for stage in {*stages_of(served, layout.pp)}:
        free = MEMORY_USED * served.cluster.memory_bytes - stage_weight_bytes(served, layout, stage)
        rooms.append(int(free / _stage_cache(served, layout, stage, context)))
    return max(0, min(rooms))

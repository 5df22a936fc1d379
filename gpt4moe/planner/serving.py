"""Serving a model: latency and throughput of generated tokens, bytes of the key-value cache, price of 1,000 tokens.

    reading weights and cache | matrix products | all-reduce over tp -> time of one stage for one micro-batch
    latency of a token = sum over the stages; throughput of a full pipeline = one micro-batch in the time of one stage

For each token, decoding reads once every weight that the batch uses. So memory bandwidth is the bottleneck until the
batch is large.
"""

from dataclasses import dataclass, replace

from gpt4moe.architecture.cache import cached_elements, rank_cache_bytes
from gpt4moe.architecture.flops import window_of
from gpt4moe.architecture.rows import Spread
from gpt4moe.architecture.table import ATTENTION
from gpt4moe.architecture.tensors import output_tensors
from gpt4moe.config.cluster import ClusterConfig
from gpt4moe.config.model import ModelConfig
from gpt4moe.config.parallel import ParallelConfig
from gpt4moe.parallel.placement import stage_layers
from gpt4moe.planner.efficiency import MEMORY_SHARE, RING_SHARE, planning_profile
from gpt4moe.planner.layer_time import timed_kinds
from gpt4moe.planner.run_time import hourly_price

SERVED_VALUE_BYTES = 2
"""Bytes of one element: weights and cache are bf16."""
ALL_REDUCE_SECONDS = 10e-6
"""Seconds of one small all-reduce over NVLink, or of one message between stages: an assumption."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Serving:
    """Serving of one model on tp x pp devices with a number of sequences in flight."""

    devices: int
    sequences: int
    context: int
    """Tokens in the cache of each sequence."""
    weight_bytes: float
    """Bytes of weights on the fullest device."""
    cache_bytes_per_token: float
    """Cache bytes of one token of one sequence, over all devices, without copies.

    For layers with an attention window: the mean over the context.
    """
    cache_bytes: float
    """Bytes of the cache on the fullest device."""
    latency_seconds: float
    """Seconds from one token of a sequence to its next one."""
    tokens_per_second: float
    """Tokens per second of all sequences together, with all devices busy."""

    def usd_per_1000_tokens(self, cluster: ClusterConfig, utilisation: float = 1.0) -> float:
        """Price of 1,000 tokens. Args: utilisation: share of the throughput that requests use; an assumption."""
        seconds = 1000 / (self.tokens_per_second * utilisation)
        return self.devices * hourly_price(cluster) * seconds / 3600


def serve(model: ModelConfig, cluster: ClusterConfig, *, tp: int, pp: int, sequences: int, context: int) -> Serving:
    """Decoding with `sequences` in flight. They form pp groups that follow each other through the pipeline.

    Stages may be uneven: 120 layers over 16 stages are eight of 8 and eight of 7.
    """
    group = max(1.0, sequences / pp)
    kinds, stages = timed_kinds(model), stage_layers(model.num_layers, ParallelConfig(pp=pp))
    peak = cluster.peak_flops_bf16 * planning_profile(cluster.generation).matrix
    seconds, weights, caches = [], [], []
    for stage, layers in enumerate(stages):
        tensors = [tensor for layer in layers for tensor in kinds[layer].tensors]
        tensors += output_tensors(model) if stage == pp - 1 else []
        held = read = operations = 0.0
        for tensor in tensors:
            size = tensor.size / (1 if tensor.spread is Spread.whole else tp)
            held += size
            met = active = 1.0
            if tensor.spread is Spread.experts:
                assert model.moe is not None
                active = model.moe.top_k / model.moe.num_experts
                met = 1 - (1 - active) ** group  # experts that some token of the group chose; only these are read
            read += size * met
            operations += 2 * size * active * group if tensor.is_matrix else 0
        cached = rank_cache_bytes(  # of one sequence
            model, layers, num_tokens=context, tp=tp, value_bytes=SERVED_VALUE_BYTES
        )
        operations += group / tp * sum(_attention_operations(model, layer, context) for layer in layers)
        moved = SERVED_VALUE_BYTES * read + group * cached
        wire = 2 * len(layers) * (ALL_REDUCE_SECONDS + 2 * SERVED_VALUE_BYTES * group * model.hidden_size / (
            RING_SHARE * cluster.nvlink_bytes_per_second)) * (tp > 1)  # fmt: skip
        work = max(moved / (cluster.memory_bytes_per_second * MEMORY_SHARE), operations / peak)
        seconds.append(work + wire + ALL_REDUCE_SECONDS * (pp > 1))
        weights.append(SERVED_VALUE_BYTES * held)
        caches.append(sequences * cached)
    return Serving(
        devices=tp * pp, sequences=sequences, context=context, weight_bytes=max(weights),
        cache_bytes_per_token=cache_bytes(model, context) / context, cache_bytes=max(caches),
        latency_seconds=max(sum(seconds), pp * max(seconds) if sequences >= pp else 0.0),
        tokens_per_second=group / max(seconds) if sequences >= pp else sequences / sum(seconds),
    )  # fmt: skip


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


def most_sequences(model: ModelConfig, cluster: ClusterConfig, *, tp: int, pp: int, context: int) -> int:
    """The most sequences whose caches fit beside the weights, with a tenth of the memory left free."""
    one = serve(model, cluster, tp=tp, pp=pp, sequences=1, context=context)
    return max(0, int((0.9 * cluster.memory_bytes - one.weight_bytes) / one.cache_bytes))

"""Seconds of one layer on one rank for one micro-batch: what computes, what moves memory, what goes over wires.

    products     the layer's matrices, at the profile's share of the peak, less for small shapes
    attention    scores and weighted values, on the bf16 units
    elementwise  norms, rotation, activation, permutation: bytes through the device's memory
    tp, cp, ep   collectives over the slowest link of their group: the share that no computation hides

Letters: T tokens of a micro-batch on a context-parallel rank (S * B / cp), H hidden, K top-k, F ffn, E experts.
"""

from dataclasses import dataclass
from math import prod

from gpt4moe.architecture.flops import tokens_seen
from gpt4moe.architecture.rows import Component, Spread
from gpt4moe.architecture.table import ATTENTION
from gpt4moe.architecture.tensors import ModelTensor, layer_tensors
from gpt4moe.config.cluster import ClusterConfig
from gpt4moe.config.model import LayerKind, ModelConfig
from gpt4moe.config.parallel import ParallelConfig, Recompute
from gpt4moe.planner.efficiency import (
    ALL_TO_ALL_SHARE,
    ATTENTION_SHARE,
    MEMORY_SHARE,
    RING_SHARE,
    Efficiency,
)

PARTS = ("products", "attention", "elementwise", "tp", "cp", "ep")


@dataclass(frozen=True, slots=True)
class TimedKind:
    """Layers that take equally long."""

    layer_kind: LayerKind
    seen: float
    """Tokens that a token attends to, on average."""
    tensors: tuple[ModelTensor, ...]


def timed_kinds(model: ModelConfig) -> list[TimedKind]:
    """The kind of each layer; made once for many layouts of a model."""
    kinds: dict[tuple[LayerKind, float], TimedKind] = {}
    of_layers = []
    for layer, kind in enumerate(model.layer_kinds):
        key = (kind, tokens_seen(model, layer))
        if key not in kinds:
            kinds[key] = TimedKind(*key, tuple(layer_tensors(model, layer)))
        of_layers.append(kinds[key])
    return of_layers


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What is timed: a model on a layout, a micro-batch, a machine."""

    model: ModelConfig
    kinds: list[TimedKind]
    """timed_kinds(model)."""
    parallel: ParallelConfig
    micro_batch_size: int
    cluster: ClusterConfig
    efficiency: Efficiency
    matrix_peak: float
    """Dense FLOP/s of the matrix units in the products' precision."""
    imbalance: float = 1.0
    """Copies of tokens at the busiest expert-parallel rank over the mean."""
    value_bytes: int = 2
    """Of an activation."""

    @property
    def tokens(self) -> float:
        """T."""
        return self.model.seq_length * self.micro_batch_size / self.parallel.cp

    @property
    def rank_tokens(self) -> float:
        """Tokens that a tensor-parallel rank has between layers, and routes."""
        return self.tokens / self.parallel.tp if self.parallel.sequence_parallel_on else self.tokens

    @property
    def copies(self) -> float:
        """Rows that the router of a rank makes: its tokens times top-k, at the busiest rank."""
        return self.rank_tokens * (self.model.moe.top_k if self.model.moe else 0) * self.imbalance

    @property
    def memory_rate(self) -> float:
        return self.cluster.memory_bytes_per_second * MEMORY_SHARE

    @property
    def is_fp8(self) -> bool:
        return self.matrix_peak > self.cluster.peak_flops_bf16


@dataclass(frozen=True, slots=True)
class Product:
    """One matrix product of the forward pass on one rank: [m, k] x [k, n], `count` times."""

    m: float
    n: float
    k: float
    count: float = 1.0
    """Local experts; 1 where all tokens meet the matrix."""


def layer_seconds(work: Work, kind: TimedKind, *, recomputes: bool = True) -> dict[str, float]:
    """Forward and backward pass of one layer, by part, with what parallel.recompute does again unless told not to."""
    products = [_product(work, t) for t in kind.tensors if t.is_matrix and len(t.shape) > 1]
    moved = elementwise_bytes(work, kind) + _cast_bytes(work, products)
    sent = wire_bytes(work, kind)
    exposed, parallel = work.efficiency.exposed, work.parallel
    of_experts = exposed if work.efficiency.exposed_experts is None else work.efficiency.exposed_experts
    forward = {
        "products": sum(_forward_seconds(work, product) for product in products),
        "attention": _attention_seconds(work, kind),
        "elementwise": moved / work.memory_rate + kind.layer_kind.has_experts * work.efficiency.moe_layer_seconds,
        "tp": exposed * sent["tp"] / link_rate(work.cluster, parallel.tp),
        "cp": exposed * sent["cp"] / link_rate(work.cluster, parallel.tp * parallel.cp),
        "ep": of_experts
        * (_all_to_all_seconds(work, sent["ep"]) + sent["etp"] / link_rate(work.cluster, parallel.etp)),
    }
    backward = {
        "products": sum(_backward_seconds(work, product) for product in products),
        "attention": 2.5 * forward["attention"],  # flash attention computes its scores again: 5 products to 2
        "elementwise": 2.0 * forward["elementwise"],
        "tp": 1.5 * forward["tp"],  # sequence parallelism gathers the input once more, for the weights' gradient
        "cp": forward["cp"],
        "ep": forward["ep"],
    }
    again = _recomputed(work, kind, forward) if recomputes else {}
    return {part: forward[part] + again.get(part, 0.0) + backward[part] for part in PARTS}


def _recomputed(work: Work, kind: TimedKind, forward: dict[str, float]) -> dict[str, float]:
    """Seconds that are spent a second time. moe: the way to the experts and their first product (moe.recompute)."""
    recompute = work.parallel.recompute
    if recompute is Recompute.full:
        return forward
    if recompute is Recompute.selective:
        return {"attention": forward["attention"]}
    if recompute is Recompute.none or not kind.layer_kind.has_experts:
        return {}
    experts = sum(_forward_seconds(work, _product(work, t)) for t in kind.tensors if t.spread is Spread.experts)
    return {"products": experts * 2 / 3, "elementwise": forward["elementwise"] / 2, "ep": forward["ep"] / 2}


def head_seconds(work: Work) -> dict[str, float]:
    """Output layer and loss, forward and backward, of the last stage."""
    product = Product(work.tokens, work.model.vocab_size / work.parallel.tp, work.model.hidden_size)
    # Logits are written, read by the loss in fp32 twice, and their gradient is written and read.
    logits = product.m * product.n * (2 * work.value_bytes + 4 * 4)
    products = _forward_seconds(work, product) + _backward_seconds(work, product)
    return {"products": products, "elementwise": logits / work.memory_rate}


def link_rate(cluster: ClusterConfig, span: float) -> float:
    """Bytes per second, one direction, of a ring over `span` neighbouring devices: its slowest link's."""
    inside = span <= cluster.devices_per_nvlink_domain
    return RING_SHARE * (cluster.nvlink_bytes_per_second if inside else cluster.fabric_bytes_per_second)


def wire_bytes(work: Work, kind: TimedKind) -> dict[str, float]:
    """What a rank sends in a layer's forward pass, by group; planner.communication has whole steps."""
    model, parallel = work.model, work.parallel
    shard = work.value_bytes * work.tokens / parallel.tp * model.hidden_size
    # A gather before and a reduce-scatter after attention, and the same around a dense MLP or a shared expert.
    is_dense = any(t.spread is Spread.tp and t.component is not Component.attention for t in kind.tensors)
    # Keys and values are gathered.
    width = ATTENTION[kind.layer_kind.attention].gathered_width(model)
    keys = work.value_bytes * work.tokens * width / parallel.tp
    sent = {"tp": (4 if is_dense else 2) * shard * (parallel.tp - 1), "cp": keys * (parallel.cp - 1)}
    copies = work.value_bytes * work.copies * model.hidden_size if kind.layer_kind.has_experts else 0.0
    # To the experts and back; under expert tensor parallelism every member needs the rows of all.
    is_late = work.efficiency.gathers_copies
    sent["ep"] = 2 * copies * (1 if is_late else parallel.etp) * (parallel.ep - 1) / parallel.ep
    tokens = work.value_bytes * work.rank_tokens * model.hidden_size * kind.layer_kind.has_experts
    sent["etp"] = 2 * (copies if is_late else tokens) * (parallel.etp - 1)
    return sent


def elementwise_bytes(work: Work, kind: TimedKind) -> float:
    """Bytes read and written by all that is no product, forward: each tensor once a read and once a write."""
    model, parallel = work.model, work.parallel
    elements = 10 * work.rank_tokens * model.hidden_size  # two norms (2 each), two residual sums (3 each)
    elements += 4 * work.tokens * model.num_attention_heads * model.head_size / parallel.tp  # queries, keys rotated
    for tensor in kind.tensors:  # gate and up in, their product out
        if tensor.spread is Spread.tp and len(tensor.shape) == 3:
            elements += 3 * work.tokens * tensor.shape[1] / parallel.tp
    if kind.layer_kind.has_experts:
        assert model.moe is not None
        ffn = model.moe.ffn_hidden_size  # etp times the rows, each 1/etp wide
        elements += work.copies * (work.efficiency.copy_passes * model.hidden_size + 3 * ffn)
        if model.planned is not None and model.planned.mlp_biases:  # added to grouped products on their own
            elements += work.copies * (4 * ffn + 2 * model.hidden_size)
    return work.value_bytes * elements


def _product(work: Work, tensor: ModelTensor) -> Product:
    n, k = prod(tensor.shape[:-1]), tensor.shape[-1]
    if tensor.spread is Spread.experts:
        assert work.model.moe is not None
        etp, all_experts = work.parallel.etp, work.model.moe.num_experts
        experts, n = all_experts / work.parallel.ep, n // all_experts
        is_first = k == work.model.hidden_size and n != k
        cut_n, cut_k = (n / etp, k) if is_first else (n, k / etp)
        return Product(work.copies * etp / experts, cut_n, cut_k, experts)
    if tensor.spread is Spread.tp:
        return Product(work.tokens, n / work.parallel.tp, k)
    return Product(work.rank_tokens, n, k)


def _forward_seconds(work: Work, product: Product) -> float:
    m, n, k = product.m, product.n, product.k
    moved = work.value_bytes * (m * k + k * n + m * n)
    return product.count * max(2 * m * n * k / _rate(work, product), moved / work.memory_rate)


def _backward_seconds(work: Work, product: Product) -> float:
    """The gradient of the input, and that of the weight, added to an fp32 buffer."""
    m, n, k = product.m, product.n, product.k
    compute = 2 * m * n * k / _rate(work, product)
    moved = work.value_bytes * (m * k + k * n + m * n)
    into_buffer = work.value_bytes * (m * k + m * n) + 8 * k * n
    return product.count * (max(compute, moved / work.memory_rate) + max(compute, into_buffer / work.memory_rate))


def _rate(work: Work, product: Product) -> float:
    """FLOP/s: the profile's share of the peak, less for every dimension that is not much larger than half the FLOP
    that a byte of memory traffic costs: as if half of an operand's traffic hid behind the operations on it."""
    half = work.matrix_peak / work.cluster.memory_bytes_per_second / 2
    shape = prod(size / (size + half) for size in (product.m, product.n, product.k))
    return work.matrix_peak * work.efficiency.matrix * shape


def _attention_seconds(work: Work, kind: TimedKind) -> float:
    model = work.model
    heads = model.num_attention_heads / work.parallel.tp
    width = ATTENTION[kind.layer_kind.attention].score_width(model)
    peak = min(work.matrix_peak, work.cluster.peak_flops_bf16)
    fused = 2.0 * heads * width * kind.seen * work.tokens / (peak * ATTENTION_SHARE)
    scores = work.value_bytes * heads * model.seq_length * work.tokens
    return fused + work.efficiency.score_passes * scores / work.memory_rate


def _cast_bytes(work: Work, products: list[Product]) -> float:
    """fp8: the input of every product is read in bf16 and written in fp8, as it is and transposed."""
    return sum(4 * product.count * product.m * product.k for product in products) if work.is_fp8 else 0.0


def _all_to_all_seconds(work: Work, sent: float) -> float:
    """What stays in the NVLink domain and what leaves it move at the same time, each over its own links."""
    parallel, cluster = work.parallel, work.cluster
    if parallel.ep == 1:
        return 0.0
    domains = max(1.0, parallel.ep * parallel.etp / cluster.devices_per_nvlink_domain)
    leaves = (1 - 1 / domains) * parallel.ep / (parallel.ep - 1)
    if work.efficiency.one_copy_per_domain and work.model.moe is not None:
        top_k = work.model.moe.top_k  # a token goes once to each domain that has one of its experts
        leaves *= domains * (1 - (1 - 1 / domains) ** top_k) / top_k
    inside = sent / cluster.nvlink_bytes_per_second
    return max(inside, sent * min(1.0, leaves) / cluster.fabric_bytes_per_second) / ALL_TO_ALL_SHARE

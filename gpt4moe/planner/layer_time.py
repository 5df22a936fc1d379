"""Seconds that one layer takes on one rank for one micro-batch: computation, memory traffic, communication.

    products     matrix products: a fitted share of the peak FLOP/s, less for small shapes
    attention    scores and weighted values, on the bf16 matrix units
    elementwise  norms, rotary embedding, activation, permutation: bytes that pass the device's memory
    tp, cp, ep   collectives over the slowest link of their group, without the part that overlaps with computation

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

LAYER_PARTS = ("products", "attention", "elementwise", "tp", "cp", "ep")


@dataclass(frozen=True, slots=True)
class TimedKind:
    """A kind of layer; all layers of one kind take the same time."""

    layer_kind: LayerKind
    seen: float
    """Mean number of tokens that a token attends to."""
    tensors: tuple[ModelTensor, ...]


def timed_kinds(model: ModelConfig) -> list[TimedKind]:
    """The kind of each layer. The result does not depend on the layout, so a search computes it once."""
    kinds: dict[tuple[LayerKind, float, bool], TimedKind] = {}
    of_layers = []
    for layer, kind in enumerate(model.layer_kinds):
        key = (kind, tokens_seen(model, layer), model.has_gated_block(layer))
        if key not in kinds:
            kinds[key] = TimedKind(*key[:2], tuple(layer_tensors(model, layer)))
        of_layers.append(kinds[key])
    return of_layers


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """Input of the time formulas: model, layout, micro-batch and cluster."""

    model: ModelConfig
    kinds: list[TimedKind]
    """The result of timed_kinds(model)."""
    parallel: ParallelConfig
    micro_batch_size: int
    cluster: ClusterConfig
    efficiency: Efficiency
    matrix_peak: float
    """Dense FLOP/s of the matrix units in the products' precision."""
    imbalance: float = 1.0
    """Token copies that the busiest expert-parallel rank gets, divided by the mean over the ranks; 1.0 or more."""
    value_bytes: int = 2
    """Bytes of one element of an activation."""

    @property
    def tokens(self) -> float:
        """T: tokens of a micro-batch on one context-parallel rank."""
        return self.model.seq_length * self.micro_batch_size / self.parallel.cp

    @property
    def rank_tokens(self) -> float:
        """Tokens that one tensor-parallel rank holds between layers; its router routes the same tokens."""
        return self.tokens / self.parallel.tp if self.parallel.sequence_parallel_on else self.tokens

    @property
    def copies(self) -> float:
        """Rows (token copies) of the busiest rank: its tokens times top-k times imbalance."""
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
    """Number of products of this shape: the local experts, or 1 for a matrix that every token uses."""


def layer_seconds(work: Work, kind: TimedKind, *, recomputes: bool = True) -> dict[str, float]:
    """Seconds of a layer's forward and backward pass, by part.

    Args:
        recomputes: whether to add the forward operations that parallel.recompute repeats.
    """
    forward, products = forward_seconds(work, kind), _products(work, kind)
    backward = {
        "products": sum(_backward_seconds(work, product) for product in products),
        "attention": 2.5 * forward["attention"],  # flash attention recomputes scores: 5 products, forward has 2
        "elementwise": 2.0 * forward["elementwise"],
        "tp": 1.5 * forward["tp"],  # sequence parallelism gathers the input again for the weight gradient
        "cp": forward["cp"],
        "ep": forward["ep"],
    }
    again = _recomputed(work, kind, forward) if recomputes else {}
    return {part: forward[part] + again.get(part, 0.0) + backward[part] for part in LAYER_PARTS}


def forward_seconds(work: Work, kind: TimedKind) -> dict[str, float]:
    """Seconds of a layer's forward pass, by part: training's, and a prompt's before generation."""
    products = _products(work, kind)
    moved = elementwise_bytes(work, kind) + _cast_bytes(work, products)
    sent = wire_bytes(work, kind)
    exposed, parallel = work.efficiency.exposed, work.parallel
    of_experts = exposed if work.efficiency.exposed_experts is None else work.efficiency.exposed_experts
    return {
        "products": sum(_forward_seconds(work, product) for product in products),
        "attention": _attention_seconds(work, kind),
        "elementwise": moved / work.memory_rate + kind.layer_kind.has_experts * work.efficiency.moe_layer_seconds,
        "tp": exposed * sent["tp"] / link_rate(work.cluster, parallel.tp),
        "cp": exposed * sent["cp"] / link_rate(work.cluster, parallel.tp * parallel.cp),
        "ep": of_experts * (all_to_all_seconds(work, sent["ep"]) + sent["etp"] / link_rate(work.cluster, parallel.etp)),
    }


def _recomputed(work: Work, kind: TimedKind, forward: dict[str, float]) -> dict[str, float]:
    """Seconds of the operations that parallel.recompute repeats, by part.

    recompute=moe repeats the all-to-all to the experts and the experts' first product (moe/recompute.py).
    """
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
    """Seconds of the output layer and the loss on the last stage, forward and backward, by part."""
    product = Product(work.tokens, work.model.vocab_size / work.parallel.tp, work.model.hidden_size)
    # Memory traffic: the logits are written; the loss reads them twice in fp32; their gradient is written and read.
    logits = product.m * product.n * (2 * work.value_bytes + 4 * 4)
    products = _forward_seconds(work, product) + _backward_seconds(work, product)
    return {"products": products, "elementwise": logits / work.memory_rate}


def link_rate(cluster: ClusterConfig, span: float) -> float:
    """Bytes per second in one direction of the slowest link in a ring over `span` neighbouring devices."""
    inside = span <= cluster.devices_per_nvlink_domain
    return RING_SHARE * (cluster.nvlink_bytes_per_second if inside else cluster.fabric_bytes_per_second)


def wire_bytes(work: Work, kind: TimedKind) -> dict[str, float]:
    """Bytes that a rank sends in one layer's forward pass, by group. For a whole step see planner/communication.py."""
    model, parallel = work.model, work.parallel
    shard = work.value_bytes * work.tokens / parallel.tp * model.hidden_size
    # A gather before and a reduce-scatter after attention, and the same around a dense MLP or a shared expert.
    is_dense = any(t.spread is Spread.tp and t.component is not Component.attention for t in kind.tensors)
    # Context parallelism gathers keys and values.
    width = ATTENTION[kind.layer_kind.attention].gathered_width(model)
    keys = work.value_bytes * work.tokens * width / parallel.tp
    sent = {"tp": (4 if is_dense else 2) * shard * (parallel.tp - 1), "cp": keys * (parallel.cp - 1)}
    copies = work.value_bytes * work.copies * model.hidden_size if kind.layer_kind.has_experts else 0.0
    # Rows go to the experts and back. Under expert tensor parallelism every member needs the rows of all members.
    is_late = work.efficiency.gathers_copies
    sent["ep"] = 2 * copies * (1 if is_late else parallel.etp) * (parallel.ep - 1) / parallel.ep
    tokens = work.value_bytes * work.rank_tokens * model.hidden_size * kind.layer_kind.has_experts
    sent["etp"] = 2 * (copies if is_late else tokens) * (parallel.etp - 1)
    return sent


def elementwise_bytes(work: Work, kind: TimedKind) -> float:
    """Bytes of element-wise kernels in the forward pass: each tensor is written once and read once."""
    model, parallel = work.model, work.parallel
    elements = 10 * work.rank_tokens * model.hidden_size  # two norms (2 each), two residual sums (3 each)
    elements += 4 * work.tokens * model.num_attention_heads * model.head_size / parallel.tp  # queries, keys rotated
    for tensor in kind.tensors:  # reads gate and up, writes their product
        if tensor.spread is Spread.tp and len(tensor.shape) == 3:
            elements += 3 * work.tokens * tensor.shape[1] / parallel.tp
    if kind.layer_kind.has_experts:
        assert model.moe is not None
        ffn = model.moe.ffn_hidden_size  # etp times as many rows, each 1/etp as wide
        elements += work.copies * (work.efficiency.copy_passes * model.hidden_size + 3 * ffn)
        if model.planned is not None and model.planned.mlp_biases:  # grouped products add biases in a separate kernel
            elements += work.copies * (4 * ffn + 2 * model.hidden_size)
    return work.value_bytes * elements


def _products(work: Work, kind: TimedKind) -> list[Product]:
    return [_product(work, t) for t in kind.tensors if t.is_matrix and len(t.shape) > 1]


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
    """Two products: the gradient of the input; the gradient of the weight, which is added to an fp32 buffer."""
    m, n, k = product.m, product.n, product.k
    compute = 2 * m * n * k / _rate(work, product)
    moved = work.value_bytes * (m * k + k * n + m * n)
    into_buffer = work.value_bytes * (m * k + m * n) + 8 * k * n
    return product.count * (max(compute, moved / work.memory_rate) + max(compute, into_buffer / work.memory_rate))


def _rate(work: Work, product: Product) -> float:
    """FLOP/s of a product: the profile's share of the peak, reduced for small dimensions.

    A dimension counts as small when it is not much larger than half the FLOP that the device does per byte of memory
    traffic. Half, because half of the traffic of an operand is assumed to overlap with computation.
    """
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
    """Memory traffic of fp8 casts: each product's input is read in bf16, written in fp8 plain and transposed."""
    return sum(4 * product.count * product.m * product.k for product in products) if work.is_fp8 else 0.0


def all_to_all_seconds(work: Work, sent: float) -> float:
    """Seconds of all-to-alls in which a rank sends so many bytes. Traffic inside and outside NVLink overlaps."""
    parallel, cluster = work.parallel, work.cluster
    if parallel.ep == 1:
        return 0.0
    domains = max(1.0, parallel.ep * parallel.etp / cluster.devices_per_nvlink_domain)
    leaves = (1 - 1 / domains) * parallel.ep / (parallel.ep - 1)
    if work.efficiency.one_copy_per_domain and work.model.moe is not None:
        top_k = work.model.moe.top_k  # a token is sent once to each NVLink domain that has one of its experts
        leaves *= domains * (1 - (1 - 1 / domains) ** top_k) / top_k
    inside = sent / cluster.nvlink_bytes_per_second
    return max(inside, sent * min(1.0, leaves) / cluster.fabric_bytes_per_second) / ALL_TO_ALL_SHARE

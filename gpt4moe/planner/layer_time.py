"""Seconds that one layer takes on one rank for one micro-batch: computation, memory traffic, communication.

    products     matrix products: a fitted share of the peak FLOP/s, less for small shapes
    attention    scores and weighted values, on the bf16 matrix units
    elementwise  norms, rotary embedding, activation, permutation: bytes that pass the device's memory
    tp, cp       collectives over the slowest link of their group, without the part that overlaps with computation
    ep           rows to the experts and back: a layer waits for them, unless another micro-batch computes meanwhile

Letters: T tokens of a micro-batch on a context-parallel rank (S * B / cp), H hidden, K top-k, F ffn, E experts.
"""

from dataclasses import dataclass, replace
from math import prod

from gpt4moe.architecture.flops import Gradients, passes_of
from gpt4moe.architecture.names import DENSE_DOWN, DENSE_GATE_UP, SHARED_DOWN, SHARED_GATE_UP
from gpt4moe.architecture.rows import Component, Spread
from gpt4moe.architecture.table import ATTENTION
from gpt4moe.architecture.tensors import ModelTensor
from gpt4moe.architecture.trained import is_adapter
from gpt4moe.architecture.vision import is_vision
from gpt4moe.config.beyond import Module
from gpt4moe.config.cluster import ClusterConfig
from gpt4moe.config.parallel import Recompute
from gpt4moe.planner.adapters import adapter_product, adapter_sum_bytes
from gpt4moe.planner.efficiency import (
    ALL_TO_ALL_SHARE,
    ATTENTION_SHARE,
    HIDDEN_SHARE,
    RING_SHARE,
    TUNED_ALL_TO_ALL_SHARE,
)
from gpt4moe.planner.work import TimedKind, Work

NO_GRADIENTS, BOTH_GRADIENTS = Gradients(of_input=False, of_weight=False), Gradients()
LATENT_UP = tuple(f"self_attention.linear_{name}.weight" for name in ("q", "q_up", "kv_up"))
"""Matrices that beyond.recompute=[mla_up_proj] multiplies again."""
COMPUTED = ("products", "attention", "elementwise")
LAYER_PARTS = (*COMPUTED, "tp", "cp", "ep")
HIDDEN = "hidden"
"""Beside LAYER_PARTS: those seconds of `ep` that are not waited for where another micro-batch computes meanwhile."""

GATE_PASSES, BIAS_PASSES = 6.0, 11.3
"""How often a row of an expert with biases passes memory beside its activation's own three: 2 bytes a pass, a third of
forward and backward together. By Megatron-core 0.16.1 (moe/experts.py, fused_bias_geglu.py) gate and up are limited and
joined: 8 F forward, 10 F backward. The second bias is weighted, added, joined and rounded in fp32: 28 bytes and 40."""


@dataclass(frozen=True, slots=True)
class Product:
    """One matrix product of the forward pass on one rank: [m, k] x [k, n], `count` times."""

    m: float
    n: float
    k: float
    count: float = 1.0
    """Number of products of this shape: the local experts, or 1 for a matrix that every token uses."""
    gradients: Gradients = BOTH_GRADIENTS


def layer_seconds(work: Work, kind: TimedKind, *, recomputes: bool = True) -> dict[str, float]:
    """Seconds of a layer's forward and backward pass, by part (LAYER_PARTS, and HIDDEN beside them).

    Args:
        recomputes: whether to add the forward operations that parallel.recompute repeats.
    """
    forward, products = forward_seconds(work, kind), _products(work, kind)
    # Sequence parallelism gathers the input again for the weight gradient.
    gathers = 1.5 if any(product.gradients.of_weight for product in products) else 1.0
    passes = float(any(product.gradients != NO_GRADIENTS for product in products))
    backward = {
        "products": sum(backward_seconds(work, product) for product in products),
        "attention": 2.5 * kind.has_backward * forward["attention"],  # flash attention: 5 products, forward has 2
        "elementwise": passes * (2.0 * forward["elementwise"] - adapter_sum_bytes(work, kind) / work.memory_rate),
        "tp": gathers * passes * forward["tp"],
        "cp": kind.has_backward * forward["cp"],
        "ep": passes * forward["ep"],
    }
    again = _recomputed(work, kind, forward) if recomputes else {}
    if work.modules and again is not forward:
        for part, seconds in modules_seconds(work, kind).items():
            again[part] = again.get(part, 0.0) + seconds
    whole = {part: forward[part] + again.get(part, 0.0) + backward[part] for part in LAYER_PARTS}
    return whole | {HIDDEN: min(HIDDEN_SHARE * whole["ep"], sum(whole[part] for part in COMPUTED))}


def forward_seconds(work: Work, kind: TimedKind) -> dict[str, float]:
    """Seconds of a layer's forward pass, by part: training's, and a prompt's before generation."""
    products = _products(work, kind)
    moved = elementwise_bytes(work, kind) + _cast_bytes(work, products)
    sent = wire_bytes(work, kind)
    exposed, parallel = work.efficiency.exposed, work.parallel
    return {
        "products": sum(product_seconds(work, product) for product in products),
        "attention": _attention_seconds(work, kind) + kind.gated * _gated_attention_seconds(work),
        "elementwise": moved / work.memory_rate + kind.layer_kind.has_experts * work.efficiency.moe_layer_seconds,
        "tp": exposed * sent["tp"] / link_rate(work.cluster, parallel.tp),
        "cp": exposed * sent["cp"] / link_rate(work.cluster, parallel.tp * parallel.cp),
        "ep": all_to_all_seconds(work, sent["ep"]) + sent["etp"] / link_rate(work.cluster, parallel.etp),
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
    experts = sum(product_seconds(work, _product(work, t)) for t in kind.tensors if t.spread is Spread.experts)
    return {"products": experts * 2 / 3, "elementwise": forward["elementwise"] / 2, "ep": forward["ep"] / 2}


def modules_seconds(work: Work, kind: TimedKind) -> dict[str, float]:
    """Seconds of the forward operations that beyond.recompute repeats, by part: the modules of work.modules."""
    again, moe, tp = dict.fromkeys(("products", "elementwise", "tp"), 0.0), work.model.moe, work.parallel.tp
    rows = {t.row.name: t for t in kind.tensors}
    moved = 0.0
    if Module.layernorm in work.modules:
        moved += 4 * work.rank_tokens * work.model.hidden_size
    if Module.moe_act in work.modules and kind.layer_kind.has_experts and moe is not None:
        moved += 3 * work.copies * moe.ffn_hidden_size
    if Module.mla_up_proj in work.modules:
        again["products"] += sum(
            product_seconds(work, _product(work, t)) for name, t in rows.items() if name in LATENT_UP
        )
    for module, first, second in (
        (Module.mlp, DENSE_GATE_UP, DENSE_DOWN), (Module.shared_experts, SHARED_GATE_UP, SHARED_DOWN),
    ):  # fmt: skip
        if module in work.modules and first in rows:
            again["products"] += sum(product_seconds(work, _product(work, rows[name])) for name in (first, second))
            moved += 3 * work.tokens * rows[second].shape[-1] / tp
            shard = work.value_bytes * work.tokens / tp * work.model.hidden_size
            again["tp"] += work.efficiency.exposed * 2 * shard * (tp - 1) / link_rate(work.cluster, tp)
    again["elementwise"] = work.value_bytes * moved / work.memory_rate
    return again


def head_seconds(work: Work) -> dict[str, float]:
    """Seconds of the output layer and the loss on the last stage, forward and backward, by part."""
    gradients = Gradients() if work.trained is None else passes_of(work.model, work.trained).head
    size = (work.tokens, work.model.vocab_size / work.parallel.tp, work.model.hidden_size)
    product = Product(*size, gradients=gradients)
    # Memory traffic: the logits are written; the loss reads them twice in fp32; their gradient is written and read.
    logits = product.m * product.n * (2 * work.value_bytes + 4 * 4)
    products = product_seconds(work, product) + backward_seconds(work, product)
    return {"products": products, "elementwise": logits / work.memory_rate}


def link_rate(cluster: ClusterConfig, span: float) -> float:
    """Bytes per second in one direction of the slowest link in a ring over `span` neighbouring devices."""
    inside = span <= cluster.devices_per_nvlink_domain
    return RING_SHARE * (cluster.nvlink_bytes_per_second if inside else cluster.fabric_bytes_per_second)


def wire_bytes(work: Work, kind: TimedKind) -> dict[str, float]:
    """Bytes that a rank sends in one layer's forward pass, by group. For a whole step see planner/communication.py."""
    model, parallel = work.model, work.parallel
    shard = work.value_bytes * work.tokens / parallel.tp * model.hidden_size
    # A gather before and a reduce-scatter after attention, and the same around a dense MLP or a shared expert, and
    # around both parts of a gated block.
    dense = (t for t in kind.tensors if t.spread is Spread.tp and not is_vision(t.name))
    blocks = 1 + any(t.component is not Component.attention for t in dense) + 2 * kind.gated
    # Context parallelism gathers keys and values.
    width = ATTENTION[kind.layer_kind.attention].gathered_width(model)
    keys = work.value_bytes * work.tokens * width / parallel.tp
    sent = {"tp": 2 * blocks * shard * (parallel.tp - 1), "cp": keys * (parallel.cp - 1)}
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
    # Two norms, and two products with a gate (2 each) beside the residual sums.
    elements += 14 * work.rank_tokens * model.hidden_size * kind.gated
    for tensor in kind.tensors:  # reads gate and up, writes their product
        if tensor.spread is Spread.tp and len(tensor.shape) == 3:
            elements += 3 * work.tokens * tensor.shape[1] / parallel.tp
    if kind.layer_kind.has_experts:
        assert model.moe is not None
        ffn = model.moe.ffn_hidden_size  # etp times as many rows, each 1/etp as wide
        elements += work.copies * (work.efficiency.copy_passes * model.hidden_size + 3 * ffn)
        if model.planned is not None and model.planned.mlp_biases:
            elements += work.copies * (GATE_PASSES * ffn + BIAS_PASSES * model.hidden_size)
    return work.value_bytes * elements + adapter_sum_bytes(work, kind)


def _products(work: Work, kind: TimedKind) -> list[Product]:
    found = []
    for place, tensor in enumerate(kind.tensors):
        gradients = kind.gradients_of(place)
        if tensor.is_matrix and len(tensor.shape) > 1:
            found.append(replace(_product(work, tensor), gradients=gradients))
        elif is_adapter(tensor):
            found.append(Product(*adapter_product(work, tensor), gradients=gradients))
        elif kind.gated and len(tensor.shape) > 1 and is_vision(tensor.name):  # keys and values of latents
            n, k = tensor.shape
            gradients = Gradients(work.trains_resampler, gradients.of_weight)
            found.append(Product(work.latents, n / work.parallel.tp, k, gradients=gradients))
    return found


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


def product_seconds(work: Work, product: Product) -> float:
    """Of the forward pass."""
    m, n, k = product.m, product.n, product.k
    moved = work.value_bytes * (m * k + k * n + m * n)
    return product.count * max(2 * m * n * k / _rate(work, product), moved / work.memory_rate)


def backward_seconds(work: Work, product: Product) -> float:
    """Up to two products: the gradient of the input; the gradient of the weight, which is added to an fp32 buffer."""
    m, n, k = product.m, product.n, product.k
    compute = 2 * m * n * k / _rate(work, product)
    moved = work.value_bytes * (m * k + k * n + m * n)
    into_buffer = work.value_bytes * (m * k + m * n) + 8 * k * n
    of_input = product.gradients.of_input * max(compute, moved / work.memory_rate)
    of_weight = product.gradients.of_weight * max(compute, into_buffer / work.memory_rate)
    return product.count * (of_input + of_weight)


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


def _gated_attention_seconds(work: Work) -> float:
    """Scores of every token with all latents of its row, and their product with values; masked, so not causal."""
    width = work.model.num_attention_heads * work.model.head_size / work.parallel.tp
    latents = work.latents / work.micro_batch_size
    return 4.0 * work.tokens * latents * width / (min(work.matrix_peak, work.cluster.peak_flops_bf16) * ATTENTION_SHARE)


def _cast_bytes(work: Work, products: list[Product]) -> float:
    """Memory traffic of fp8 casts: each product's input is read in bf16, written in fp8 plain and transposed."""
    return sum(4 * product.count * product.m * product.k for product in products) if work.is_fp8 else 0.0


def all_to_all_seconds(work: Work, sent: float) -> float:
    """Seconds of all-to-alls in which a rank sends so many bytes, a copy of a token for each of its experts. Traffic
    inside and outside NVLink overlaps."""
    parallel, cluster = work.parallel, work.cluster
    if parallel.ep == 1:
        return 0.0
    domains = max(1.0, parallel.ep * parallel.etp / cluster.devices_per_nvlink_domain)
    inside, leaves, share = 1.0, (1 - 1 / domains) * parallel.ep / (parallel.ep - 1), ALL_TO_ALL_SHARE
    if work.efficiency.is_tuned and work.model.moe is not None:
        inside, share = copies_kept(work.model.moe.top_k, parallel.ep), TUNED_ALL_TO_ALL_SHARE
        leaves *= copies_kept(work.model.moe.top_k, domains)
    seconds = max(inside / cluster.nvlink_bytes_per_second, min(1.0, leaves) / cluster.fabric_bytes_per_second)
    return sent * seconds / share


def copies_kept(top_k: int, places: float) -> float:
    """Of the rows that leave a place (a rank, an NVLink domain) the share that is sent, where a token goes once to each
    place that has one of its experts. Args: places: over which the experts are spread; at most 1: none leave."""
    return places * (1 - (1 - 1 / places) ** top_k) / top_k if places > 1 else 1.0

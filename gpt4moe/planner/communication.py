"""Bytes that a rank sends in one training step, by group and kind of operation: the formulas of the papers.

    tp         sequence parallelism, arXiv:2205.05198 section 4.2.2: a block gathers and scatters forward, mirrors both
               backward, and gathers its input again
    cp         keys and values gathered forward, their gradients scattered backward
    ep, etp    all-to-all to the experts and back, forward and backward (arXiv:2006.16668); where experts are cut,
               their tokens are gathered before and summed after
    pp         an activation to the next stage and its gradient back for each micro-batch: arXiv:2104.04473
    dp_cp,     ZeRO stage 1, arXiv:1910.02054 section 7: gradients scattered, weights gathered; dense parameters
    expert_dp  and experts apart

A ring over p ranks sends p - 1 times a rank's part in an all-gather or reduce-scatter, and both in an all-reduce
(parallel.wire counts the same way). Without parallel.recompute, which does forward operations twice. What an engine
sends besides (counts, statistics, norms, padding) is its surplus.
"""

from dataclasses import dataclass

from gpt4moe.architecture.count import chunk_tensors, rank_parameters
from gpt4moe.architecture.rows import Spread
from gpt4moe.config.model import ModelConfig
from gpt4moe.config.parallel import ParallelConfig
from gpt4moe.config.run import RunConfig
from gpt4moe.parallel.layout import Layout
from gpt4moe.parallel.placement import rank_chunks
from gpt4moe.planner.states import GRADIENT_BYTES, VALUE_BYTES

Traffic = dict[str, dict[str, float]]
"""Group -> kind of operation -> bytes sent."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutedRows:
    """Rows that cross between expert-parallel ranks in one step, of one rank, over its MoE layers and micro-batches."""

    sent: float
    received: float


def bytes_per_step(run: RunConfig, layout: Layout, *, stage: int, routed: RoutedRows | None = None) -> Traffic:
    """What a rank of pipeline rank `stage` sends.

    Args:
        routed: what the router really did; by default every expert gets the same share and nothing is dropped.
    """
    model, parallel = run.model, run.parallel
    chunks = rank_chunks(model.num_layers, parallel, stage)
    layers = [layer for chunk in chunks for layer in chunk]
    micro_batches = run.training.global_batch_size // (run.training.micro_batch_size * layout.dp)
    element = VALUE_BYTES[run.precision.dtype]
    tokens = model.seq_length // layout.cp * run.training.micro_batch_size
    shard = tokens // layout.tp * model.hidden_size * element * micro_batches
    kinds = model.layer_kinds
    moe_layers = sum(kinds[layer].has_experts for layer in layers)
    rows = routed or _even_rows(model, layout, moe_layers, tokens, micro_batches)
    cut_experts = 2.0 * (layout.etp - 1) * moe_layers * shard
    traffic: Traffic = {
        "tp": _tensor_parallel(model, parallel, stage=stage, layers=layers, shard=shard)
        | {"all_reduce": _tensor_parallel_sums(model, parallel, stage=stage, tokens=tokens * micro_batches)},
        "cp": _context_parallel(model, layout, len(layers) * tokens * element * micro_batches),
        "ep": {"all_to_all": 2.0 * (rows.sent + rows.received) * model.hidden_size * element},
        "etp": {"all_gather": cut_experts, "reduce_scatter": cut_experts},
        "pp": {"send": shard * _boundaries(layout, stage)},
        "embedding": {"all_reduce": _tied_embedding(model, layout, stage)},
    }
    sizes = rank_parameters(model, parallel, stage)
    traffic["dp_cp"] = _zero_1(sizes.dense, layout.dp * layout.cp, element)
    traffic["expert_dp"] = _zero_1(sizes.expert, layout.expert_dp, element)
    sent = {group: {kind: value for kind, value in kinds.items() if value} for group, kinds in traffic.items()}
    return {group: kinds for group, kinds in sent.items() if kinds}


def bytes_of_all_ranks(run: RunConfig, layout: Layout) -> Traffic:
    """The sum over all ranks, with even routing."""
    total: Traffic = {}
    for stage in range(layout.pp):
        for group, kinds in bytes_per_step(run, layout, stage=stage).items():
            for kind, size in kinds.items():
                row = total.setdefault(group, {})
                row[kind] = row.get(kind, 0.0) + size * layout.stage_size
    return total


def _even_rows(model: ModelConfig, layout: Layout, moe_layers: int, tokens: int, micro_batches: int) -> RoutedRows:
    if model.moe is None:
        return RoutedRows(sent=0, received=0)
    rows = tokens / layout.tp * layout.etp * model.moe.top_k * moe_layers * micro_batches
    crossing = rows * (layout.ep - 1) / layout.ep
    return RoutedRows(sent=crossing, received=crossing)


def _tensor_parallel(
    model: ModelConfig, parallel: ParallelConfig, *, stage: int, layers: list[int], shard: int
) -> dict[str, float]:
    """shard: bytes of S/cp/tp x B x H, all micro-batches."""
    # Attention is one block; a dense MLP, or shared experts, a second one. Routed experts are not cut over tp.
    shared = model.moe is not None and model.moe.shared_expert_ffn_hidden_size is not None
    kinds = model.layer_kinds
    blocks = sum(1 if kinds[layer].has_experts and not shared else 2 for layer in layers)
    first, last = stage == 0, stage == parallel.pp - 1
    # The embedding scatters forward; the output layer gathers forward, and again backward.
    gathers = 3 * blocks + first + 2 * last
    scatters = 2 * blocks + first + last
    part = (parallel.tp - 1) * shard
    return {"all_gather": float(gathers * part), "reduce_scatter": float(scatters * part)}


def _tensor_parallel_sums(model: ModelConfig, parallel: ParallelConfig, *, stage: int, tokens: int) -> float:
    """The vocabulary-parallel cross-entropy (three numbers a token, fp32; arXiv:1909.08053 section 3), and gradients of
    what every rank has whole: norms and routers, of which each saw a part of the sequence."""
    whole = sum(
        tensor.size
        for chunk in chunk_tensors(model, parallel, stage)
        for tensor in chunk
        if tensor.spread is Spread.whole
    )
    cross_entropy = 3 * 4 * tokens if stage == parallel.pp - 1 else 0
    return _all_reduced(cross_entropy + GRADIENT_BYTES * whole, parallel.tp)


def _context_parallel(model: ModelConfig, layout: Layout, width_bytes: int) -> dict[str, float]:
    """width_bytes: of one element of every token of S/cp x B, over layers and micro-batches."""
    keys_and_values = 2 * model.query_groups // layout.tp * model.head_size
    part = float((layout.cp - 1) * keys_and_values * width_bytes)
    return {"all_gather": part, "reduce_scatter": part}


def _boundaries(layout: Layout, stage: int) -> int:
    """Messages that a rank sends for one micro-batch: activations to later stages, gradients to earlier ones."""
    stages = [chunk * layout.pp + stage for chunk in range(layout.vpp)]
    return sum((place < layout.pp * layout.vpp - 1) + (place > 0) for place in stages)


def _tied_embedding(model: ModelConfig, layout: Layout, stage: int) -> float:
    """The gradient of an embedding that the first and the last stage share."""
    if not model.tied_embeddings or layout.pp == 1 or stage not in (0, layout.pp - 1):
        return 0.0
    return _all_reduced(GRADIENT_BYTES * model.vocab_size * model.hidden_size / layout.tp, 2)


def _zero_1(parameters: int, ranks: int, element: int) -> dict[str, float]:
    share = (ranks - 1) / ranks * parameters
    return {"reduce_scatter": share * GRADIENT_BYTES, "all_gather": share * element}


def _all_reduced(size: float, ranks: int) -> float:
    return 2 * (ranks - 1) / ranks * size

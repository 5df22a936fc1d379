"""Bytes that a rank sends in one training step, by group and kind of operation, by the formulas of the papers.

    tp         sequence parallelism, arXiv:2205.05198 section 4.2.2. Forward: all-gather before a block, reduce-scatter
               after it. Backward: the reverse, and one more all-gather of the block's input
    cp         all-gather of keys and values forward, reduce-scatter of their gradients backward
    ep, etp    all-to-all to the experts and back, forward and backward (arXiv:2006.16668). With etp > 1 the experts'
               tokens are gathered before and summed after
    pp         for each micro-batch an activation to the next stage and its gradient back (arXiv:2104.04473)
    dp_cp,     ZeRO stage 1, arXiv:1910.02054 section 7: reduce-scatter of gradients, all-gather of weights. dp_cp for
    expert_dp  dense parameters, expert_dp for experts; of trained weights alone
    model      of a vision model (training.images): every micro-batch's latents to all ranks of tp x pp, the sum of the
               resampler's gradients over them; over pp the sum of the latents' gradients

In a ring over p ranks, an all-gather or a reduce-scatter sends p - 1 times a rank's part; an all-reduce is one of each
(parallel.wire counts the same way). The formulas leave out the forward operations that parallel.recompute repeats, and
what an engine sends besides: counts, statistics, norms, padding.
"""

from dataclasses import dataclass
from math import ceil

from gpt4moe.architecture.count import chunk_tensors
from gpt4moe.architecture.rows import Cut, Spread
from gpt4moe.architecture.tensors import resampler_tensors
from gpt4moe.config.model import ModelConfig
from gpt4moe.config.parallel import ParallelConfig
from gpt4moe.config.plan import images_per_sequence
from gpt4moe.config.run import RunConfig
from gpt4moe.parallel.layout import Layout
from gpt4moe.parallel.placement import rank_chunks
from gpt4moe.planner.stacks import gradient_bytes
from gpt4moe.planner.states import VALUE_BYTES, trained_tensors

Traffic = dict[str, dict[str, float]]
"""Group -> kind of operation -> bytes sent."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutedRows:
    """Rows that one rank exchanges with other expert-parallel ranks in a step, over MoE layers and micro-batches."""

    sent: float
    received: float


def bytes_per_step(run: RunConfig, layout: Layout, *, stage: int, routed: RoutedRows | None = None) -> Traffic:
    """Bytes that one rank of pipeline stage `stage` sends in a step.

    Args:
        routed: row counts of a real router. Default: every expert gets the same share and no token is dropped.
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
        | {"all_reduce": _tensor_parallel_sums(run, stage=stage, tokens=tokens * micro_batches)},
        "cp": _context_parallel(model, layout, len(layers) * tokens * element * micro_batches),
        "ep": {"all_to_all": row_bytes(rows, model.hidden_size * element)},
        "etp": {"all_gather": cut_experts, "reduce_scatter": cut_experts},
        "pp": {"send": shard * _boundaries(layout, stage)},
        "embedding": {"all_reduce": _tied_embedding(run, layout, stage)},
    }
    sizes, gradient = _trained_sizes(run, stage), gradient_bytes(run)
    traffic["dp_cp"] = _zero_1(sizes[False], layout.dp * layout.cp, gradient, element)
    traffic["expert_dp"] = _zero_1(sizes[True], layout.expert_dp, gradient, element)
    _add_images(traffic, run, layout, micro_batches)
    sent = {group: {kind: value for kind, value in kinds.items() if value} for group, kinds in traffic.items()}
    return {group: kinds for group, kinds in sent.items() if kinds}


def row_bytes(rows: RoutedRows, width_bytes: int) -> float:
    """Bytes that the rank sends for its rows: there and back, forward and backward. width_bytes: of one row."""
    return 2.0 * (rows.sent + rows.received) * width_bytes


def bytes_of_all_ranks(run: RunConfig, layout: Layout) -> Traffic:
    """Bytes that all ranks together send in a step, with even routing."""
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
    # Attention is one block. A dense MLP, or shared experts, is a second one. Routed experts are not cut over tp.
    shared = model.moe is not None and model.moe.shared_expert_ffn_hidden_size is not None
    kinds = model.layer_kinds
    blocks = sum(1 if kinds[layer].has_experts and not shared else 2 for layer in layers)
    blocks += 2 * sum(model.has_gated_block(layer) for layer in layers)
    first, last = stage == 0, stage == parallel.pp - 1
    # The embedding does a reduce-scatter forward. The output layer does an all-gather forward, and one more backward.
    gathers = 3 * blocks + first + 2 * last
    scatters = 2 * blocks + first + last
    part = (parallel.tp - 1) * shard
    return {"all_gather": float(gathers * part), "reduce_scatter": float(scatters * part)}


def _tensor_parallel_sums(run: RunConfig, *, stage: int, tokens: int) -> float:
    """Bytes of the all-reduces over tp.

    The vocabulary-parallel cross-entropy sums three fp32 numbers a token (arXiv:1909.08053 section 3). Norms and
    routers are whole on every rank, but each rank sees a part of the sequence, so their gradients are summed too.
    """
    whole = sum(
        tensor.size
        for chunk in chunk_tensors(run.model, run.parallel, stage)
        for tensor in chunk
        if tensor.row.cut is Cut.whole  # not the resampler, whose gradient is whole on every rank
    )
    cross_entropy = 3 * 4 * tokens if stage == run.parallel.pp - 1 else 0
    return _all_reduced(cross_entropy + gradient_bytes(run) * whole, run.parallel.tp)


def _context_parallel(model: ModelConfig, layout: Layout, width_bytes: int) -> dict[str, float]:
    """width_bytes: bytes of one element for each of the S/cp x B tokens, times layers and micro-batches."""
    keys_and_values = 2 * model.query_groups // layout.tp * model.head_size
    part = float((layout.cp - 1) * keys_and_values * width_bytes)
    return {"all_gather": part, "reduce_scatter": part}


def _boundaries(layout: Layout, stage: int) -> int:
    """Messages that a rank sends for one micro-batch: activations to the next stage, gradients to the previous one."""
    stages = [chunk * layout.pp + stage for chunk in range(layout.vpp)]
    return sum((place < layout.pp * layout.vpp - 1) + (place > 0) for place in stages)


def _tied_embedding(run: RunConfig, layout: Layout, stage: int) -> float:
    """Bytes of the all-reduce of a tied embedding's gradient between the first and the last stage."""
    model = run.model
    if not model.tied_embeddings or layout.pp == 1 or stage not in (0, layout.pp - 1):
        return 0.0
    return _all_reduced(gradient_bytes(run) * model.vocab_size * model.hidden_size / layout.tp, 2)


def _trained_sizes(run: RunConfig, stage: int) -> dict[bool, int]:
    """Trained parameters of a rank: whether of experts -> elements."""
    trained, sizes = trained_tensors(run), {True: 0, False: 0}
    for chunk in chunk_tensors(run.model, run.parallel, stage):
        for tensor in chunk:
            if trained is None or tensor.name in trained:
                sizes[tensor.spread is Spread.experts] += tensor.local_size(run.parallel)
    return sizes


def _add_images(traffic: Traffic, run: RunConfig, layout: Layout, micro_batches: int) -> None:
    vision, trained = run.model.vision, trained_tensors(run)
    if vision is None:
        return
    images, ranks = ceil(images_per_sequence(run)) * run.training.micro_batch_size, layout.tp * layout.pp
    latents = micro_batches * images * vision.resampler.num_latents * vision.width * VALUE_BYTES[run.precision.dtype]
    tensors = resampler_tensors(run.model)
    learned = sum(tensor.size for tensor in tensors if trained is None or tensor.name in trained)
    # Of a broadcast the first rank sends all, and every other one passes it on.
    traffic["model"] = {
        "broadcast": float(latents * (ranks > 1)),
        "all_reduce": _all_reduced(gradient_bytes(run) * learned, ranks),
    }
    if learned:
        traffic["pp"]["all_reduce"] = _all_reduced(latents, layout.pp)


def _zero_1(parameters: int, ranks: int, gradient: int, element: int) -> dict[str, float]:
    share = (ranks - 1) / ranks * parameters
    return {"reduce_scatter": share * gradient, "all_gather": share * element}


def _all_reduced(size: float, ranks: int) -> float:
    return 2 * (ranks - 1) / ranks * size

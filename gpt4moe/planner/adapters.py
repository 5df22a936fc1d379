"""What adapters (LoRA) add to a layer: tensors that autograd keeps, products, memory traffic.

    y = W x + scale * B (A x)    kept: x, for the gradient of A (the frozen W needs none of it); A x [.., rank], for B's
                                 moved: B (A x) is scaled and added to W x

Letters: T tokens of a micro-batch on a rank, T/tp between layers, N rows at the experts of a rank.
"""

from math import prod

from gpt4moe.architecture.rows import Cut, Spread
from gpt4moe.architecture.tensors import ModelTensor, layer_tensors
from gpt4moe.architecture.trained import is_adapter
from gpt4moe.config.parallel import Recompute
from gpt4moe.planner.micro_batch import Bytes, MicroBatch
from gpt4moe.planner.work import TimedKind, Work

SUM_PASSES = 5
"""How often what an adapter adds passes the memory: it is read and written to be scaled, then read with W's result, and
the sum is written (model/adapters.py, moe/experts.py). Backward as often: scaled, and added to the input's gradient."""


def adapter_activations(micro: MicroBatch, layer: int, recompute: Recompute) -> Bytes:
    """Bytes that a layer keeps because it has adapters; the inputs of their matrices are counted with the layer."""
    kept = 0
    firsts = [t for t in layer_tensors(micro.model, layer) if is_adapter(t) and t.name.endswith("lora_a")]
    of_experts = [tensor for tensor in firsts if tensor.spread is Spread.experts]
    for tensor in firsts:
        rank = tensor.shape[-2]
        if tensor.spread is not Spread.experts:
            kept += rank * (micro.tokens if tensor.row.cut is Cut.whole else micro.split_tokens) * micro.item
        elif recompute is not Recompute.moe:
            kept += rank * micro.expert_rows * micro.item
    if of_experts and recompute is not Recompute.moe and not micro.grouped:
        # The loop over experts does not compute its activation again where it has adapters.
        assert micro.model.moe is not None
        kept += micro.expert_rows * (micro.model.moe.ffn_hidden_size // micro.layout.etp) * micro.item
    return {"adapters": kept} if kept else {}


def adapter_product(work: Work, tensor: ModelTensor) -> tuple[float, float, float, float]:
    """(m, n, k, count) of the product with an A or B on one rank: [m, k] x [k, n], count times."""
    cut, shape, tp, etp = tensor.row.cut, tensor.shape, work.parallel.tp, work.parallel.etp
    if tensor.spread is Spread.experts:
        assert work.model.moe is not None
        experts = work.model.moe.num_experts / work.parallel.ep
        rows, n, k = work.copies * etp / experts, float(prod(shape[1:-1])), float(shape[-1])
        if cut is Cut.experts_gated:  # rows of gate and up
            n /= etp
        elif cut is Cut.experts:  # columns of down
            k /= etp
        return rows, n, k, experts
    n, k = float(prod(shape[:-1])), float(shape[-1])
    if cut is Cut.columns:
        return work.tokens, n, k / tp, 1.0
    if cut is Cut.whole:
        return work.rank_tokens, n, k, 1.0
    return work.tokens, n / tp, k, 1.0


def adapter_sum_bytes(work: Work, kind: TimedKind) -> float:
    """Memory traffic of scaling and adding what the adapters of a layer add, in the forward pass."""
    sizes = (adapter_product(work, t) for t in kind.tensors if is_adapter(t) and t.name.endswith("lora_b"))
    return work.value_bytes * SUM_PASSES * sum(m * n * count for m, n, _, count in sizes)

"""What autograd does not keep where weights are frozen: inputs of products that make no gradient of the weight.

    linear layers   their input (Megatron's LinearWithFrozenWeight keeps the weight alone)
    unfused norm    the normalised input; a fused one needs its input for the input's own gradient
    router          the fp32 copy of its tokens
    experts         grouped products: their rows, and the activation before the second. The loop over experts keeps both
    gated block    the same of its norms and linear layers; what a gate multiplies

A layer below everything trained keeps nothing at all; it is counted as if something before it were trained.
"""

from gpt4moe.architecture.names import (
    ATTENTION_OUT,
    DENSE_DOWN,
    DENSE_GATE_UP,
    EXPERTS_DOWN,
    EXPERTS_GATE_UP,
    INPUT_NORM,
    K_NORM,
    MLP_NORM,
    Q_NORM,
    QKV,
    ROUTER,
    SHARED_DOWN,
    SHARED_GATE_UP,
)
from gpt4moe.architecture.vision import BLOCK
from gpt4moe.config.model import AttentionKind
from gpt4moe.config.parallel import Recompute
from gpt4moe.planner.micro_batch import FLOAT, Bytes, MicroBatch


def unkept(micro: MicroBatch, layer: int, recompute: Recompute) -> Bytes:
    """Bytes to subtract from activations.layer_activations, by the same names."""
    frozen = micro.frozen(layer)
    if not frozen:
        return {}
    less: Bytes = {}
    if not micro.fused_norm:
        norm = micro.split_tokens * micro.model.hidden_size * FLOAT
        less["norms"] = norm * len(frozen & {INPUT_NORM, MLP_NORM})
        groups = micro.model.query_groups * (K_NORM in frozen) + micro.model.num_attention_heads * (Q_NORM in frozen)
        if micro.model.qk_norm:
            less["qk_norms"] = micro.tokens * groups // micro.layout.tp * micro.model.head_size * FLOAT
    if micro.kinds[layer].attention is AttentionKind.grouped_query:
        less |= _of_attention(micro, frozen, again=recompute is Recompute.selective)
    if micro.model.has_gated_block(layer):
        less |= _of_gated_block(micro, {name.removeprefix(f"{BLOCK}.") for name in frozen})
    if micro.kinds[layer].has_experts:
        return less | _of_experts(micro, frozen, recompute)
    return less | _of_dense(micro, frozen)


def _of_attention(micro: MicroBatch, frozen: frozenset[str], *, again: bool) -> Bytes:
    less = {"attention_input": micro.hidden_bytes} if QKV in frozen else {}
    if ATTENTION_OUT in frozen and micro.layout.cp > 1 and not again:  # the two chunks' output, concatenated
        heads = micro.model.num_attention_heads // micro.layout.tp
        less["attention_output"] = micro.tokens * heads * micro.model.head_size * micro.item
    return less


def _of_gated_block(micro: MicroBatch, frozen: set[str]) -> Bytes:
    """Of images.gated_activations. Args: frozen: names within the block; others are ignored."""
    model, tp = micro.model, micro.layout.tp
    assert model.vision is not None
    norm = 0 if micro.fused_norm else micro.split_tokens * model.hidden_size * FLOAT
    heads = model.num_attention_heads // tp
    return {
        "gated_norms": norm * len(frozen & {"input_layernorm.weight", "pre_mlp_layernorm.weight"}),
        "gated_inputs": micro.hidden_bytes * len(frozen & {"linear_q.weight", "linear_fc1.weight"}),
        "gated_outputs": micro.hidden_bytes * len(frozen & {"attention_gate", "mlp_gate"}),
        "gated_attention": micro.tokens * heads * model.head_size * micro.item * ("linear_proj.weight" in frozen),
        "gated_mlp": micro.tokens * (model.vision.ffn_hidden_size // tp) * micro.item * ("linear_fc2.weight" in frozen),
    }


def _of_dense(micro: MicroBatch, frozen: frozenset[str]) -> Bytes:
    product = micro.tokens * ((micro.model.ffn_hidden_size or 0) // micro.layout.tp) * micro.item
    less = {"mlp_input": micro.hidden_bytes} if DENSE_GATE_UP in frozen else {}
    return less | ({"mlp_hidden": product} if DENSE_DOWN in frozen else {})


def _of_experts(micro: MicroBatch, frozen: frozenset[str], recompute: Recompute) -> Bytes:
    model, moe, rows = micro.model, micro.model.moe, micro.expert_rows
    assert moe is not None
    less: Bytes = {"router": micro.split_tokens * model.hidden_size * FLOAT} if ROUTER in frozen else {}
    if moe.shared_expert_ffn_hidden_size is not None:
        product = micro.tokens * (moe.shared_expert_ffn_hidden_size // micro.layout.tp) * micro.item
        # In fp32, or with recompute=moe, another part of the layer keeps the input.
        is_kept = micro.item != FLOAT and recompute is not Recompute.moe
        less["shared_experts"] = product * (SHARED_DOWN in frozen)
        less["shared_experts"] += micro.hidden_bytes * (is_kept and SHARED_GATE_UP in frozen)
    if recompute is Recompute.moe or not micro.grouped:
        return less
    if EXPERTS_GATE_UP in frozen:
        less["expert_input"] = rows * model.hidden_size * micro.item
    if EXPERTS_DOWN in frozen:
        less["expert_hidden"] = rows * (moe.ffn_hidden_size // micro.layout.etp) * micro.item
    return less

"""Activations: bytes of the tensors that autograd keeps from one micro-batch for the backward pass, by name.

    embedding | per layer: norm, attention, norm, dense MLP or experts | final norm, output layer, cross-entropy

The list comes from torch's saved-tensor hooks in a real run (torch 2.13, Megatron-core 0.16.1); tests compare the sums
with such a run. Kernels keep different tensors, so MicroBatch names the kernels. RMSNorm is one kernel on GPUs and
four operations on CPUs. Grouped products keep their activation; the loop over experts recomputes it.
Letters: T tokens of a micro-batch on a rank (S * B / cp), T/tp between layers under sequence parallelism, N rows at the
experts of a rank. What frozen weights spare is in frozen.py, gated blocks and the resampler in images.py.
"""

from collections.abc import Callable

from gpt4moe.architecture.names import EXPERTS_DOWN, FINAL_NORM, OUTPUT_LAYER, WORD_EMBEDDINGS
from gpt4moe.config.beyond import Module
from gpt4moe.config.model import AttentionKind, MlpKind
from gpt4moe.config.parallel import Recompute
from gpt4moe.planner.adapters import adapter_activations
from gpt4moe.planner.frozen import unkept
from gpt4moe.planner.images import gated_activations
from gpt4moe.planner.micro_batch import FLOAT, INT, LONG, Bytes, MicroBatch


def layer_activations(micro: MicroBatch, layer: int, recompute: Recompute = Recompute.none) -> Bytes:
    """Bytes that a layer (global index) keeps from its forward pass to its backward pass, by tensor."""
    if recompute is Recompute.full:
        return {"layer_input": micro.hidden_bytes}
    norm = norm_activations(micro, micro.split_tokens, micro.model.hidden_size)
    attention = ATTENTION_ACTIVATIONS[micro.kinds[layer].attention](micro, recompute is Recompute.selective)
    mlp = MLP_ACTIVATIONS[micro.kinds[layer].mlp](micro, recompute is Recompute.moe)
    gated = gated_activations(micro, norm) if micro.model.has_gated_block(layer) else {}
    kept = {"norms": 2 * norm, **attention, **mlp, **gated}
    less = unkept(micro, layer, recompute)
    kept = {name: size - less.get(name, 0) for name, size in kept.items()}
    kept = without_modules(micro, layer, kept) if micro.modules else kept
    return kept | adapter_activations(micro, layer, recompute)


def layer_bytes(micro: MicroBatch, layer: int, recompute: Recompute = Recompute.none) -> int:
    """The sum of layer_activations."""
    key = (micro.kind(layer), recompute)
    if key not in micro.sums:
        micro.sums[key] = sum(layer_activations(micro, layer, recompute).values())
    return micro.sums[key]


def norm_activations(micro: MicroBatch, rows: int, width: int) -> int:
    """RMSNorm of [rows, width]. Fused: the input and 1/rms. Unfused: the input in fp32, 1/rms, the normalised input."""
    if micro.fused_norm:
        return rows * (width * micro.item + FLOAT)
    return rows * (2 * width + 1) * FLOAT


def attention_activations(micro: MicroBatch, again: bool = False) -> Bytes:
    """Queries and keys after the rotary embedding, the projection's output (with the values; of some kernels the values
    alone), and attention's output.

    With context parallelism, gathered keys and values are kept instead of the rank's own. mask_bytes counts the masks.

    Args:
        again: whether core attention is recomputed; then only its input and output are kept.
    """
    model, tokens, item, layout = micro.model, micro.tokens, micro.item, micro.layout
    heads, groups, width = model.num_attention_heads // layout.tp, model.query_groups // layout.tp, model.head_size
    # Sine and cosine, for queries and for keys; by our kernel one table for all layers.
    tables = 0 if micro.fused_rotary else 2 * 2 * micro.sequence * width * item
    copies = micro.kernels.copies_values or (micro.fused_rotary and not model.qk_norm)
    output = tokens * heads * width * item
    fp8_copy = output // item if micro.product_item < item else 0  # attention keeps its own
    parts = {
        "attention_input": micro.hidden_bytes // item * micro.product_item,
        "rotary": tables + tokens * (heads + groups) * width * item,
        "qk_norms": _qk_norm_activations(micro, heads + groups) if model.qk_norm else 0,
        "attention_output": output + fp8_copy,
    }
    gathers = layout.cp > 1 and not micro.kernels.copies_values  # the others pass keys and values round
    if again or not gathers:
        queries = 0 if copies else heads + groups  # queries and keys are with the rotary ones
        parts["qkv"] = tokens * (queries + groups) * width * item
    if again:
        return parts
    parts["softmax"] = tokens * heads * FLOAT  # each row's logsumexp
    if gathers:
        parts["rotary"] -= tokens * groups * width * item  # gathered keys replace the rank's own
        parts["qkv"] = layout.cp * tokens * 2 * groups * width * item
        parts["attention_output"] += output  # once for the two chunks, once concatenated
    return parts


def mask_bytes(micro: MicroBatch) -> int:
    """Bytes of the masks of a rank's two chunks with context parallelism. All layers and micro-batches share them."""
    chunk, cp = micro.sequence // 2, micro.layout.cp
    # Chunk n of queries sees n + 1 chunks of keys. Summed over a rank's two chunks, this is equal on all ranks.
    return (2 * cp + 1) * chunk * chunk * micro.item if cp > 1 and not micro.kernels.copies_values else 0


def latent_attention_activations(micro: MicroBatch, again: bool = False) -> Bytes:
    """Multi-head latent attention, from its description (arXiv:2405.04434, section 2.1).

    Latents are normed, then projected up to a key and a value for each head. The trainer cannot build this attention,
    so the formula was not compared with a measurement.
    """
    mla, tokens, item, heads = (
        micro.model.mla, micro.tokens, micro.item, micro.model.num_attention_heads // micro.layout.tp
    )  # fmt: skip
    assert mla is not None
    latents = [width for width in (mla.q_lora_rank, mla.kv_lora_rank) if width is not None]
    parts = {
        "attention_input": micro.hidden_bytes // item * micro.product_item,
        "latents": sum(
            norm_activations(micro, micro.split_tokens, width) + micro.split_tokens * width * item for width in latents
        ),
        "rotary": 2 * 2 * micro.sequence * mla.qk_rope_head_dim * item,
        "qkv": tokens * heads * (2 * mla.qk_head_dim + mla.v_head_dim) * item,
        "attention_output": tokens * heads * mla.v_head_dim * item,
    }
    return parts if again else parts | {"softmax": tokens * heads * FLOAT}


def _qk_norm_activations(micro: MicroBatch, heads: int) -> int:
    rows, width = micro.tokens * heads, micro.model.head_size
    whole = norm_activations(micro, rows, width)
    # The norm's input is the projection's output, counted there. In bf16 the unfused norm keeps an fp32 copy of it.
    shared = rows * width * micro.item if micro.fused_norm or micro.item == FLOAT else 0
    return whole - shared


def dense_activations(micro: MicroBatch, again: bool = False) -> Bytes:
    """The input [T/tp, H]; what mlp_hidden_bytes has."""
    ffn = (micro.model.ffn_hidden_size or 0) // micro.layout.tp
    return {
        "mlp_input": micro.hidden_bytes // micro.item * micro.product_item,
        "mlp_hidden": mlp_hidden_bytes(micro, ffn),
    }


def mlp_hidden_bytes(micro: MicroBatch, ffn: int) -> int:
    """Gate and up [T, 2 F/tp]; silu(gate) and up, unless one kernel makes the product; the product [T, F/tp], which the
    second matrix keeps. Without a gate: the first matrix's output and GELU of it, [T, F/tp] each.

    Args: ffn: F/tp.
    """
    ungated = micro.model.planned is not None and micro.model.planned.ungated_mlp
    inner = 1 if ungated else 2 if micro.kernels.fused_mlp else 4
    return micro.tokens * ffn * (inner * micro.item + micro.product_item)


def expert_activations(micro: MicroBatch, again: bool = False) -> Bytes:
    """Router, dispatch and experts of one layer.

    Args:
        again: whether recompute=moe runs dispatch and experts again; then only their input is kept.
    """
    model, moe, tokens, rows = micro.model, micro.model.moe, micro.split_tokens, micro.expert_rows
    assert moe is not None
    experts, ffn = moe.num_experts, moe.ffn_hidden_size // micro.layout.etp
    exact = micro.kernels.fp32_router_input  # the router multiplies in fp32
    weight_copy = experts * model.hidden_size * FLOAT if micro.item != FLOAT and exact else 0
    vectors = (5 * experts + 2) * FLOAT  # sums of the auxiliary losses
    # Probabilities for the choice and for the z-loss, their log-sums; one kernel keeps one of each.
    numbers = experts + 1 if micro.fused_router else 2 * experts + 2
    router = router_input_bytes(micro) + tokens * (numbers + moe.top_k) * FLOAT
    router += tokens * model.hidden_size * FLOAT if moe.router.input_jitter else 0  # the noise
    router += tokens * moe.top_k * LONG + weight_copy + vectors
    # Indices of the sort by expert, and where nothing is dropped of its inverse.
    assignment = (2 if moe.router.capacity_factor is None else 1) * micro.layout.etp * tokens * moe.top_k * LONG
    # Of the sort by local expert and of its inverse; grouped products have padding among their rows.
    order = 2 * rows * LONG if micro.grouped or micro.layout.ep > 1 else 0
    input_copy = micro.hidden_bytes if micro.item != FLOAT else 0  # the router keeps an fp32 copy of bf16 tokens
    if again:  # the dispatch plan is kept
        kept = {
            "router": router,
            "dispatch": assignment + order,
            "expert_input": input_copy + tokens * moe.top_k * FLOAT,
        }
        return kept | _shared_activations(micro, input_copy=0)
    hidden = rows * (2 * ffn * micro.item + FLOAT)  # and the router's weight
    if micro.grouped:
        order, hidden = order + micro.local_experts * INT, hidden + rows * ffn * micro.product_item
    return {
        "router": router,
        "dispatch": assignment + order,
        "expert_input": rows * model.hidden_size * micro.product_item,
        "expert_hidden": hidden,
        **_shared_activations(micro, input_copy=input_copy),
    }


def _shared_activations(micro: MicroBatch, *, input_copy: int) -> Bytes:
    """Shared experts: a dense MLP beside the routed experts. recompute=moe does not recompute it.

    Args:
        input_copy: bytes of its input if no other part of the layer keeps it, else 0.
    """
    moe = micro.model.moe
    if moe is None or moe.shared_expert_ffn_hidden_size is None:
        return {}
    ffn = moe.shared_expert_ffn_hidden_size // micro.layout.tp
    return {"shared_experts": input_copy + mlp_hidden_bytes(micro, ffn)}


def router_input_bytes(micro: MicroBatch) -> int:
    """The router's tokens [T/tp, H]: an fp32 copy, or the norm's output."""
    each = FLOAT if micro.kernels.fp32_router_input else micro.item
    return micro.split_tokens * micro.model.hidden_size * each


def without_modules(micro: MicroBatch, layer: int, kept: Bytes) -> Bytes:
    """What is left of a layer's activations where beyond.recompute makes outputs of modules again.

    Args: kept: of layer_activations; of parts that parallel.recompute repeats already nothing is taken twice.
    """
    moe, less, has_experts = micro.model.moe, dict.fromkeys(kept, 0), micro.kinds[layer].has_experts
    if Module.layernorm in micro.modules:
        less["attention_input"] = kept["attention_input"]
        if has_experts:
            less["router"] = min(kept["router"], router_input_bytes(micro))
        else:
            less["mlp_input"] = kept["mlp_input"]
    if (
        Module.moe_act in micro.modules
        and has_experts
        and "expert_hidden" in kept
        and micro.grouped
        and EXPERTS_DOWN not in micro.frozen(layer)
    ):
        assert moe is not None
        less["expert_hidden"] = micro.expert_rows * (moe.ffn_hidden_size // micro.layout.etp) * micro.product_item
    if Module.mla_up_proj in micro.modules and "latents" in kept:
        less |= {name: kept[name] for name in ("qkv", "rotary")}
    if Module.mlp in micro.modules and not has_experts:  # the norm before it is repeated with it
        less |= {name: kept[name] for name in ("mlp_input", "mlp_hidden")}
    if Module.shared_experts in micro.modules and "shared_experts" in kept:
        less["shared_experts"] = kept["shared_experts"]
    return {name: max(0, size - less[name]) for name, size in kept.items()}


Activations = Callable[[MicroBatch, bool], Bytes]
"""(micro-batch, whether parallel.recompute repeats this part) -> bytes that the part keeps, by tensor."""

ATTENTION_ACTIVATIONS: dict[AttentionKind, Activations] = {
    AttentionKind.grouped_query: attention_activations,
    AttentionKind.latent: latent_attention_activations,
}
MLP_ACTIVATIONS: dict[MlpKind, Activations] = {
    MlpKind.dense: dense_activations,
    MlpKind.moe: expert_activations,
}


def embedding_activations(micro: MicroBatch) -> Bytes:
    """Token ids, and the mask of ids in this rank's part of the vocabulary; nothing if the embedding is frozen."""
    is_kept = micro.trains(WORD_EMBEDDINGS)
    return {"embedding": micro.tokens * (LONG + (1 if micro.layout.tp > 1 else 0)) * is_kept}


def head_activations(micro: MicroBatch) -> Bytes:
    """Final norm, output layer, and the vocabulary-parallel cross-entropy.

    The cross-entropy keeps fp32 probabilities instead of the logits, or the logits where it is one kernel each way.
    """
    vocabulary = micro.model.vocab_size // micro.layout.tp
    output = WORD_EMBEDDINGS if micro.model.tied_embeddings else OUTPUT_LAYER
    spared = 0 if micro.fused_norm or micro.trains(FINAL_NORM) else micro.split_tokens * micro.model.hidden_size * FLOAT
    return {
        "norms": norm_activations(micro, micro.split_tokens, micro.model.hidden_size) - spared,
        "output_input": micro.hidden_bytes * micro.trains(output),
        "logits": micro.tokens * (vocabulary * (micro.item if micro.fused_loss else FLOAT) + LONG + 1),
    }

"""Names: ours -> Hugging Face's, one table an architecture and style of names."""

from gpt4moe.convert.rules import (
    Row,
    copied,
    copied_gate_up,
    fused_gate_up,
    gate_up,
    gate_up_of_experts,
    one_of_experts,
    qkv,
    whole,
)

_AROUND = (
    Row("embedding.word_embeddings.weight", whole, "model.embed_tokens.weight"),
    Row("decoder.layers.{layer}.input_layernorm.weight", whole, "model.layers.{layer}.input_layernorm.weight"),
    Row(
        "decoder.layers.{layer}.self_attention.linear_qkv.weight",
        qkv,
        "model.layers.{layer}.self_attn.{part}_proj.weight",
    ),
    Row(
        "decoder.layers.{layer}.self_attention.q_layernorm.weight",
        whole,
        "model.layers.{layer}.self_attn.q_norm.weight",
    ),
    Row(
        "decoder.layers.{layer}.self_attention.k_layernorm.weight",
        whole,
        "model.layers.{layer}.self_attn.k_norm.weight",
    ),
    Row(
        "decoder.layers.{layer}.self_attention.linear_proj.weight",
        whole,
        "model.layers.{layer}.self_attn.o_proj.weight",
    ),
    Row(
        "decoder.layers.{layer}.pre_mlp_layernorm.weight",
        whole,
        "model.layers.{layer}.post_attention_layernorm.weight",
    ),
    Row("decoder.final_layernorm.weight", whole, "model.norm.weight"),
    Row("output_layer.weight", whole, "lm_head.weight"),
)

_ROUTER = "decoder.layers.{layer}.mlp.router.weight"
_GATE_UP = "decoder.layers.{layer}.mlp.experts.gate_up"
_DOWN = "decoder.layers.{layer}.mlp.experts.down"

MIXTRAL = (
    *_AROUND,
    Row(_ROUTER, whole, "model.layers.{layer}.block_sparse_moe.gate.weight"),
    Row(
        _GATE_UP,
        gate_up_of_experts("w1", "w3"),
        "model.layers.{layer}.block_sparse_moe.experts.{expert}.{part}.weight",
    ),
    Row(_DOWN, one_of_experts, "model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight"),
)
"""The names that every engine reads, and that transformers writes."""

MIXTRAL_FUSED = (
    *_AROUND,
    Row(_ROUTER, whole, "model.layers.{layer}.mlp.gate.weight"),
    Row(_GATE_UP, fused_gate_up, "model.layers.{layer}.mlp.experts.gate_up_proj"),
    Row(_DOWN, whole, "model.layers.{layer}.mlp.experts.down_proj"),
)
"""The names of transformers 5's own modules (save_pretrained with save_original_format=False)."""

DENSE = (
    *_AROUND,
    Row("decoder.layers.{layer}.mlp.linear_fc1.weight", gate_up, "model.layers.{layer}.mlp.{part}_proj.weight"),
    Row("decoder.layers.{layer}.mlp.linear_fc2.weight", whole, "model.layers.{layer}.mlp.down_proj.weight"),
)
"""Llama, Mistral, Qwen3."""

QWEN3_MOE = (
    *DENSE,
    Row(_ROUTER, whole, "model.layers.{layer}.mlp.gate.weight"),
    Row(
        _GATE_UP,
        gate_up_of_experts("gate", "up"),
        "model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight",
    ),
    Row(_DOWN, one_of_experts, "model.layers.{layer}.mlp.experts.{expert}.down_proj.weight"),
)

QWEN3_MOE_FUSED = (*DENSE, *(row for row in MIXTRAL_FUSED if row not in _AROUND))

UPCYCLED = (
    *_AROUND,
    Row(_GATE_UP, copied_gate_up, "model.layers.{layer}.mlp.{part}_proj.weight"),
    Row(_DOWN, copied, "model.layers.{layer}.mlp.down_proj.weight"),
)
"""A dense MLP as every expert; the router has no counterpart."""

"""Names of tensors, ours and Hugging Face's: a table for each architecture and style of names. No torch."""

from gpt4moe.architecture import names
from gpt4moe.convert.rules import (
    NameRow,
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
    NameRow(names.WORD_EMBEDDINGS, whole, "model.embed_tokens.weight"),
    NameRow(names.INPUT_NORM, whole, "model.layers.{layer}.input_layernorm.weight"),
    NameRow(
        names.QKV,
        qkv,
        "model.layers.{layer}.self_attn.{part}_proj.weight",
    ),
    NameRow(
        names.Q_NORM,
        whole,
        "model.layers.{layer}.self_attn.q_norm.weight",
    ),
    NameRow(
        names.K_NORM,
        whole,
        "model.layers.{layer}.self_attn.k_norm.weight",
    ),
    NameRow(
        names.ATTENTION_OUT,
        whole,
        "model.layers.{layer}.self_attn.o_proj.weight",
    ),
    NameRow(
        names.MLP_NORM,
        whole,
        "model.layers.{layer}.post_attention_layernorm.weight",
    ),
    NameRow(names.FINAL_NORM, whole, "model.norm.weight"),
    NameRow(names.OUTPUT_LAYER, whole, "lm_head.weight"),
)

MIXTRAL = (
    *_AROUND,
    NameRow(names.ROUTER, whole, "model.layers.{layer}.block_sparse_moe.gate.weight"),
    NameRow(
        names.EXPERTS_GATE_UP,
        gate_up_of_experts("w1", "w3"),
        "model.layers.{layer}.block_sparse_moe.experts.{expert}.{part}.weight",
    ),
    NameRow(names.EXPERTS_DOWN, one_of_experts, "model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight"),
)
"""Mixtral: the names that transformers writes and that every program reads."""

MIXTRAL_FUSED = (
    *_AROUND,
    NameRow(names.ROUTER, whole, "model.layers.{layer}.mlp.gate.weight"),
    NameRow(names.EXPERTS_GATE_UP, fused_gate_up, "model.layers.{layer}.mlp.experts.gate_up_proj"),
    NameRow(names.EXPERTS_DOWN, whole, "model.layers.{layer}.mlp.experts.down_proj"),
)
"""The names of transformers 5's own modules (save_pretrained with save_original_format=False)."""

LLAMA = (
    *_AROUND,
    NameRow(names.DENSE_GATE_UP, gate_up, "model.layers.{layer}.mlp.{part}_proj.weight"),
    NameRow(names.DENSE_DOWN, whole, "model.layers.{layer}.mlp.down_proj.weight"),
)
"""Llama, Mistral, Qwen3."""

QWEN3_MOE = (
    *LLAMA,
    NameRow(names.ROUTER, whole, "model.layers.{layer}.mlp.gate.weight"),
    NameRow(
        names.EXPERTS_GATE_UP,
        gate_up_of_experts("gate", "up"),
        "model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight",
    ),
    NameRow(names.EXPERTS_DOWN, one_of_experts, "model.layers.{layer}.mlp.experts.{expert}.down_proj.weight"),
)

QWEN3_MOE_FUSED = (*LLAMA, *(row for row in MIXTRAL_FUSED if row not in _AROUND))

UPCYCLED = (
    *_AROUND,
    NameRow(names.EXPERTS_GATE_UP, copied_gate_up, "model.layers.{layer}.mlp.{part}_proj.weight"),
    NameRow(names.EXPERTS_DOWN, copied, "model.layers.{layer}.mlp.down_proj.weight"),
)
"""Upcycling: a dense model whose MLP becomes every expert. The new router has no Hugging Face tensor."""

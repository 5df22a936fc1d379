"""The table of tensors: one row for every tensor that a model can have. No torch.

    embedding | each layer: norm, attention, norm, MLP | final norm, output layer

The planner, the model, checkpoints, conversions and the proof all read this table. A layer has the rows of its
attention kind and of its MLP kind (config.model.LayerKind).

Rows stand in the order in which Megatron registers the tensors, because its gradient buffers follow that order.
The planner counts rows without an initial value; the trainer cannot build them.
"""

from collections.abc import Callable
from dataclasses import dataclass

from gpt4moe.architecture import names
from gpt4moe.architecture.rows import Cut, Family, Has, Initial, Shape, TensorRow, always, linear_rows, norm_rows
from gpt4moe.config.model import AttentionKind, LayerKind, MlaConfig, MlpKind, ModelConfig, PlannedConfig
from gpt4moe.config.moe import MoEConfig


def _planned(model: ModelConfig) -> PlannedConfig:
    return model.planned or PlannedConfig()


def _moe(model: ModelConfig) -> MoEConfig:
    assert model.moe is not None
    return model.moe


def _mla(model: ModelConfig) -> MlaConfig:
    assert model.mla is not None
    return model.mla


def _ffn(model: ModelConfig) -> int:
    return model.ffn_hidden_size or 0


def _shared(model: ModelConfig) -> int:
    return _moe(model).shared_expert_ffn_hidden_size or 0


EMBEDDING_ROWS = (
    TensorRow(name=names.WORD_EMBEDDINGS, family=Family.embedding, shape=lambda m: (m.vocab_size, m.hidden_size),
        cut=Cut.rows, initial=Initial.normal, is_matrix=False),
    TensorRow(name="embedding.position_embeddings.weight", family=Family.embedding,
        shape=lambda m: (m.seq_length, m.hidden_size), cut=Cut.whole, initial=None,
        present=lambda m: _planned(m).learned_positions, is_matrix=False),
)  # fmt: skip
INPUT_NORM_ROWS = norm_rows(names.INPUT_NORM, Family.input_norm)
MLP_NORM_ROWS = norm_rows(names.MLP_NORM, Family.mlp_norm)
OUTPUT = (
    *norm_rows(names.FINAL_NORM, Family.final_norm),
    TensorRow(name=names.OUTPUT_LAYER, family=Family.output_layer, shape=lambda m: (m.vocab_size, m.hidden_size),
        cut=Cut.rows, initial=Initial.normal, present=lambda m: not m.tied_embeddings),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionRow:
    """A kind of attention: its tensors, and the widths that operations, memory and traffic are counted by."""

    rows: tuple[TensorRow, ...]
    score_width: Callable[[ModelConfig], int]
    """Elements of one token's key and value that a query of one head is multiplied with."""
    gathered_width: Callable[[ModelConfig], int]
    """Elements of one token's keys and values, all heads: what context parallelism gathers."""
    cached_width: Callable[[ModelConfig], int]
    """Elements that decoding keeps of one token."""
    decoding_width: Callable[[ModelConfig], int]
    """As score_width, for decoding from the cache."""
    cache_parts: Callable[[ModelConfig], int]
    """Parts that tensor parallelism can cut the cache into."""


def _biased(model: ModelConfig) -> bool:
    return _planned(model).attention_biases


GROUPED_QUERY = (
    TensorRow(name="self_attention.sinks", family=Family.attention_out, shape=lambda m: (m.num_attention_heads,),
        cut=Cut.rows, initial=None, present=lambda m: _planned(m).attention_sinks, is_matrix=False),
    *linear_rows(TensorRow(name=names.ATTENTION_OUT, family=Family.attention_out, cut=Cut.columns,
                 shape=lambda m: (m.hidden_size, m.num_attention_heads * m.head_size), initial=Initial.residual),
             _biased),
    # Rows: for each query group its query heads, its key, its value. So tp can cut dim 0.
    *linear_rows(TensorRow(name=names.QKV, family=Family.qkv, cut=Cut.rows, initial=Initial.normal,
                 shape=lambda m: ((m.num_attention_heads + 2 * m.query_groups) * m.head_size, m.hidden_size),
                 pieces=lambda m: ("model.num_query_groups", m.query_groups), is_stored_first=True), _biased),
    # Every head of a layer shares these two.
    *norm_rows(names.Q_NORM, Family.head_norms, lambda m: m.head_size, present=lambda m: m.qk_norm),
    *norm_rows(names.K_NORM, Family.head_norms, lambda m: m.head_size, present=lambda m: m.qk_norm),
)  # fmt: skip


def _latent_row(
    name: str, family: Family, shape: Callable[[ModelConfig], Shape], cut: Cut, has: Has = always
) -> TensorRow:
    return TensorRow(
        name=f"self_attention.{name}.weight", family=family, shape=shape, cut=cut, initial=None, present=has
    )


# arXiv:2405.04434, equations 9-17: down to a latent (whole on every rank), its norm, up to the heads (over tp).
LATENT = (
    *norm_rows(names.Q_NORM, Family.head_norms, lambda m: _mla(m).q_lora_rank or 0,
           present=lambda m: _mla(m).q_lora_rank is not None, initial=None),
    *norm_rows("self_attention.kv_layernorm.weight", Family.head_norms, lambda m: _mla(m).kv_lora_rank, initial=None),
    _latent_row("linear_proj", Family.attention_out,
                lambda m: (m.hidden_size, m.num_attention_heads * _mla(m).v_head_dim), Cut.columns),
    _latent_row("linear_kv_down", Family.qkv,
                lambda m: (_mla(m).kv_lora_rank + _mla(m).qk_rope_head_dim, m.hidden_size), Cut.whole),
    _latent_row("linear_kv_up", Family.qkv,
                lambda m: (m.num_attention_heads * (_mla(m).qk_nope_head_dim + _mla(m).v_head_dim),
                           _mla(m).kv_lora_rank), Cut.rows),
    _latent_row("linear_q", Family.qkv, lambda m: (m.num_attention_heads * _mla(m).qk_head_dim, m.hidden_size),
                Cut.rows, lambda m: _mla(m).q_lora_rank is None),
    _latent_row("linear_q_down", Family.qkv, lambda m: (_mla(m).q_lora_rank or 0, m.hidden_size),
                Cut.whole, lambda m: _mla(m).q_lora_rank is not None),
    _latent_row("linear_q_up", Family.qkv,
                lambda m: (m.num_attention_heads * _mla(m).qk_head_dim, _mla(m).q_lora_rank or 0),
                Cut.rows, lambda m: _mla(m).q_lora_rank is not None),
)  # fmt: skip

ATTENTION: dict[AttentionKind, AttentionRow] = {
    AttentionKind.grouped_query: AttentionRow(
        rows=GROUPED_QUERY,
        score_width=lambda m: 2 * m.head_size,
        gathered_width=lambda m: 2 * m.query_groups * m.head_size,
        cached_width=lambda m: 2 * m.query_groups * m.head_size,
        decoding_width=lambda m: 2 * m.head_size,
        cache_parts=lambda m: m.query_groups,
    ),
    AttentionKind.latent: AttentionRow(
        rows=LATENT,
        score_width=lambda m: _mla(m).qk_head_dim + _mla(m).v_head_dim,
        gathered_width=lambda m: 2 * m.num_attention_heads * m.head_size,  # as wide as the queries
        # The latent, and the keys' rotary part that all heads share: arXiv:2405.04434, section 2.1.2.
        cached_width=lambda m: _mla(m).kv_lora_rank + _mla(m).qk_rope_head_dim,
        decoding_width=lambda m: 2 * _mla(m).kv_lora_rank + _mla(m).qk_rope_head_dim,
        cache_parts=lambda m: 1,  # latents are whole on every rank
    ),
}


def _has_mlp_bias(model: ModelConfig) -> bool:
    return _planned(model).mlp_biases


def _has_shared(model: ModelConfig) -> bool:
    return _moe(model).shared_expert_ffn_hidden_size is not None


def _experts(name: str, family: Family, shape: Callable[[ModelConfig], Shape], cut: Cut, initial: Initial) -> TensorRow:
    return TensorRow(name=name, family=family, shape=shape, cut=cut, initial=initial,
               pieces=lambda m: ("model.moe.num_experts", _moe(m).num_experts))  # fmt: skip


def _expert_bias(name: str, family: Family, shape: Callable[[ModelConfig], Shape], cut: Cut) -> TensorRow:
    return TensorRow(name=f"{name}_bias", family=family, shape=shape, cut=cut, initial=None, present=_has_mlp_bias,
               is_matrix=False)  # fmt: skip


DENSE = (
    *linear_rows(TensorRow(name=names.DENSE_GATE_UP, family=Family.dense_gate_up, cut=Cut.gated_rows,
                 initial=Initial.normal,
                 shape=lambda m: (_ffn(m), m.hidden_size) if _planned(m).ungated_mlp else (2, _ffn(m), m.hidden_size)),
             _has_mlp_bias),
    *linear_rows(TensorRow(name=names.DENSE_DOWN, family=Family.dense_down, cut=Cut.columns, initial=Initial.residual,
                 shape=lambda m: (m.hidden_size, _ffn(m))), _has_mlp_bias),
)  # fmt: skip
MOE = (
    *linear_rows(TensorRow(name=names.ROUTER, family=Family.router, cut=Cut.whole, initial=Initial.normal,
                 shape=lambda m: (_moe(m).num_experts, m.hidden_size)), _has_mlp_bias),
    _experts(names.EXPERTS_GATE_UP, Family.experts_gate_up,
             lambda m: (_moe(m).num_experts, 2, _moe(m).ffn_hidden_size, m.hidden_size),
             Cut.experts_gated, Initial.normal),
    _experts(names.EXPERTS_DOWN, Family.experts_down,
             lambda m: (_moe(m).num_experts, m.hidden_size, _moe(m).ffn_hidden_size), Cut.experts, Initial.residual),
    TensorRow(name=names.SHARED_GATE_UP, family=Family.shared_experts, cut=Cut.gated_rows,
        initial=Initial.normal, shape=lambda m: (2, _shared(m), m.hidden_size), present=_has_shared,
        is_stored_first=True),
    TensorRow(name=names.SHARED_DOWN, family=Family.shared_experts, cut=Cut.columns,
        initial=Initial.residual, shape=lambda m: (m.hidden_size, _shared(m)), present=_has_shared,
        is_stored_first=True),
    _expert_bias(names.EXPERTS_GATE_UP, Family.experts_gate_up,
                 lambda m: (_moe(m).num_experts, 2, _moe(m).ffn_hidden_size), Cut.experts_gated),
    _expert_bias(names.EXPERTS_DOWN, Family.experts_down, lambda m: (_moe(m).num_experts, m.hidden_size), Cut.experts),
)  # fmt: skip
MLP: dict[MlpKind, tuple[TensorRow, ...]] = {MlpKind.dense: DENSE, MlpKind.moe: MOE}


def layer_parts(kind: LayerKind) -> tuple[tuple[TensorRow, ...], ...]:
    """The rows of a layer: norm, attention, norm, MLP."""
    return INPUT_NORM_ROWS, ATTENTION[kind.attention].rows, MLP_NORM_ROWS, MLP[kind.mlp]

"""Every tensor of a model, from its configuration alone: name, shape over all ranks, and how ranks divide it.

The planner's own table, written from the architecture; the trainer's is read off built modules (model.parameters).
Tests hold the two together, name by name.

    embedding | layer 0 .. L-1: norm, attention, norm, dense MLP or router and experts | final norm, output layer

In the order in which Megatron registers them: its gradient buffers are laid out by it (planner.buffers).
Shapes: H hidden, N heads, G query groups, D head dim, F ffn, E experts, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from math import prod

from gpt4moe.config.model import ModelConfig
from gpt4moe.config.parallel import ParallelConfig
from gpt4moe.config.planned import PlannedConfig


class Component(str, Enum):
    """What a tensor is part of; parameters are counted by it."""

    embedding = "embedding"
    attention = "attention"
    dense_mlp = "dense_mlp"
    router = "router"
    experts = "experts"
    shared_experts = "shared_experts"
    norms = "norms"
    output_layer = "output_layer"


class Spread(Enum):
    """Which ranks of a pipeline stage divide a tensor."""

    whole = "every rank holds all of it"
    tp = "cut over tp"
    experts = "cut over ep x etp"


@dataclass(frozen=True, slots=True)
class ModelTensor:
    name: str
    """The logical name, as model.parameters has it."""
    component: Component
    shape: tuple[int, ...]
    spread: Spread

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def is_matrix(self) -> bool:
        """Whether tokens are multiplied by it: not norms, biases, sinks, nor the embedding's look-up."""
        return self.component not in (Component.norms, Component.embedding) and not self.name.endswith(
            ("bias", "sinks")
        )

    def local_size(self, parallel: ParallelConfig) -> int:
        """Elements that one rank holds."""
        ranks = {Spread.whole: 1, Spread.tp: parallel.tp, Spread.experts: parallel.ep * parallel.etp}
        return self.size // ranks[self.spread]


def embedding_tensors(model: ModelConfig) -> list[ModelTensor]:
    kind, hidden = Component.embedding, model.hidden_size
    tensors = [ModelTensor("embedding.word_embeddings.weight", kind, (model.vocab_size, hidden), Spread.tp)]
    if _planned(model).learned_positions:
        shape = (model.seq_length, hidden)
        tensors.append(ModelTensor("embedding.position_embeddings.weight", kind, shape, Spread.whole))
    return tensors


def layer_tensors(model: ModelConfig, layer: int) -> list[ModelTensor]:
    """The tensors of one layer (its global index, from 0)."""
    prefix = f"decoder.layers.{layer}"
    attention = _attention if model.mla is None else _latent_attention
    mlp = _experts if model.moe_layers[layer] else _dense
    return [
        *_norm(model, f"{prefix}.input_layernorm"),
        *attention(model, f"{prefix}.self_attention"),
        *_norm(model, f"{prefix}.pre_mlp_layernorm"),
        *mlp(model, f"{prefix}.mlp"),
    ]


def output_tensors(model: ModelConfig) -> list[ModelTensor]:
    """The final norm and the output layer (none where it is the embedding)."""
    norm = _norm(model, "decoder.final_layernorm")
    shape = (model.vocab_size, model.hidden_size)
    head = ModelTensor("output_layer.weight", Component.output_layer, shape, Spread.tp)
    return norm if model.tied_embeddings else [*norm, head]


def model_tensors(model: ModelConfig) -> Iterator[ModelTensor]:
    """All of them, in model order."""
    yield from embedding_tensors(model)
    for layer in range(model.num_layers):
        yield from layer_tensors(model, layer)
    yield from output_tensors(model)


def _planned(model: ModelConfig) -> PlannedConfig:
    return model.planned or PlannedConfig()


def _norm(model: ModelConfig, name: str, width: int | None = None) -> list[ModelTensor]:
    names = ("weight", "bias") if _planned(model).norm_biases else ("weight",)
    shape = (width or model.hidden_size,)
    return [ModelTensor(f"{name}.{part}", Component.norms, shape, Spread.whole) for part in names]


def _linear(name: str, kind: Component, shape: tuple[int, ...], *, bias: bool, spread: Spread) -> list[ModelTensor]:
    """A matrix [..., out, in], and its bias [..., out] where there is one."""
    weight = ModelTensor(f"{name}.weight", kind, shape, spread)
    return [weight, ModelTensor(f"{name}.bias", kind, shape[:-1], spread)] if bias else [weight]


def _attention(model: ModelConfig, prefix: str) -> Iterator[ModelTensor]:
    width, hidden, planned = model.head_size, model.hidden_size, _planned(model)
    queries, keys = model.num_attention_heads * width, model.query_groups * width
    kind, bias = Component.attention, planned.attention_biases
    if planned.attention_sinks:
        yield ModelTensor(f"{prefix}.sinks", kind, (model.num_attention_heads,), Spread.tp)
    yield from _linear(f"{prefix}.linear_proj", kind, (hidden, queries), bias=bias, spread=Spread.tp)
    yield from _linear(f"{prefix}.linear_qkv", kind, (queries + 2 * keys, hidden), bias=bias, spread=Spread.tp)
    for name in ("q_layernorm", "k_layernorm") if model.qk_norm else ():
        yield from _norm(model, f"{prefix}.{name}", width)


def _latent_attention(model: ModelConfig, prefix: str) -> Iterator[ModelTensor]:
    """arXiv:2405.04434, equations 9-17: down to a latent (whole on every rank), its norm, up to the heads (over tp)."""
    mla, hidden, heads, kind = model.mla, model.hidden_size, model.num_attention_heads, Component.attention
    assert mla is not None
    shapes = {
        "linear_proj": (hidden, heads * mla.v_head_dim),
        "linear_kv_down": (mla.kv_lora_rank + mla.qk_rope_head_dim, hidden),
        "linear_kv_up": (heads * (mla.qk_nope_head_dim + mla.v_head_dim), mla.kv_lora_rank),
    }
    if mla.q_lora_rank is None:
        shapes["linear_q"] = (heads * mla.qk_head_dim, hidden)
    else:
        shapes["linear_q_down"] = (mla.q_lora_rank, hidden)
        shapes["linear_q_up"] = (heads * mla.qk_head_dim, mla.q_lora_rank)
        yield from _norm(model, f"{prefix}.q_layernorm", mla.q_lora_rank)
    yield from _norm(model, f"{prefix}.kv_layernorm", mla.kv_lora_rank)
    for name, shape in shapes.items():
        spread = Spread.whole if name.endswith("down") else Spread.tp
        yield ModelTensor(f"{prefix}.{name}.weight", kind, shape, spread)


def _dense(model: ModelConfig, prefix: str) -> Iterator[ModelTensor]:
    ffn, hidden, planned = model.ffn_hidden_size or 0, model.hidden_size, _planned(model)
    kind, bias = Component.dense_mlp, planned.mlp_biases
    first = (ffn, hidden) if planned.ungated_mlp else (2, ffn, hidden)
    yield from _linear(f"{prefix}.linear_fc1", kind, first, bias=bias, spread=Spread.tp)
    yield from _linear(f"{prefix}.linear_fc2", kind, (hidden, ffn), bias=bias, spread=Spread.tp)


def _experts(model: ModelConfig, prefix: str) -> Iterator[ModelTensor]:
    moe, hidden, kind = model.moe, model.hidden_size, Component.experts
    assert moe is not None
    count, ffn, bias = moe.num_experts, moe.ffn_hidden_size, _planned(model).mlp_biases
    yield from _linear(f"{prefix}.router", Component.router, (count, hidden), bias=bias, spread=Spread.whole)
    yield ModelTensor(f"{prefix}.experts.gate_up", kind, (count, 2, ffn, hidden), Spread.experts)
    yield ModelTensor(f"{prefix}.experts.down", kind, (count, hidden, ffn), Spread.experts)
    if moe.shared_expert_ffn_hidden_size is not None:
        shared, kind_of_shared = moe.shared_expert_ffn_hidden_size, Component.shared_experts
        for name, shape in (("linear_fc1", (2, shared, hidden)), ("linear_fc2", (hidden, shared))):
            yield ModelTensor(f"{prefix}.shared_experts.{name}.weight", kind_of_shared, shape, Spread.tp)
    if bias:
        yield ModelTensor(f"{prefix}.experts.gate_up_bias", kind, (count, 2, ffn), Spread.experts)
        yield ModelTensor(f"{prefix}.experts.down_bias", kind, (count, hidden), Spread.experts)

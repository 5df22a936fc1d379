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


class Component(str, Enum):
    """What a tensor is part of; parameters are counted by it."""

    embedding = "embedding"
    attention = "attention"
    dense_mlp = "dense_mlp"
    router = "router"
    experts = "experts"
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
        """Whether tokens are multiplied by it; norms and the embedding's look-up are not products."""
        return self.component not in (Component.norms, Component.embedding)

    def local_size(self, parallel: ParallelConfig) -> int:
        """Elements that one rank holds."""
        ranks = {Spread.whole: 1, Spread.tp: parallel.tp, Spread.experts: parallel.ep * parallel.etp}
        return self.size // ranks[self.spread]


def embedding_tensors(model: ModelConfig) -> list[ModelTensor]:
    shape = (model.vocab_size, model.hidden_size)
    return [ModelTensor("embedding.word_embeddings.weight", Component.embedding, shape, Spread.tp)]


def layer_tensors(model: ModelConfig, layer: int) -> list[ModelTensor]:
    """The tensors of one layer (its global index, from 0)."""
    prefix, hidden = f"decoder.layers.{layer}", (model.hidden_size,)
    mlp = _experts(model, prefix) if model.moe_layers[layer] else _dense(model, prefix)
    return [
        ModelTensor(f"{prefix}.input_layernorm.weight", Component.norms, hidden, Spread.whole),
        *_attention(model, prefix),
        ModelTensor(f"{prefix}.pre_mlp_layernorm.weight", Component.norms, hidden, Spread.whole),
        *mlp,
    ]


def output_tensors(model: ModelConfig) -> list[ModelTensor]:
    """The final norm and the output layer (none where it is the embedding)."""
    norm = ModelTensor("decoder.final_layernorm.weight", Component.norms, (model.hidden_size,), Spread.whole)
    shape = (model.vocab_size, model.hidden_size)
    head = ModelTensor("output_layer.weight", Component.output_layer, shape, Spread.tp)
    return [norm] if model.tied_embeddings else [norm, head]


def model_tensors(model: ModelConfig) -> Iterator[ModelTensor]:
    """All of them, in model order."""
    yield from embedding_tensors(model)
    for layer in range(model.num_layers):
        yield from layer_tensors(model, layer)
    yield from output_tensors(model)


def _attention(model: ModelConfig, prefix: str) -> Iterator[ModelTensor]:
    width, hidden = model.head_size, model.hidden_size
    queries, keys = model.num_attention_heads * width, model.query_groups * width
    kind = Component.attention
    yield ModelTensor(f"{prefix}.self_attention.linear_proj.weight", kind, (hidden, queries), Spread.tp)
    yield ModelTensor(f"{prefix}.self_attention.linear_qkv.weight", kind, (queries + 2 * keys, hidden), Spread.tp)
    for name in ("q_layernorm", "k_layernorm") if model.qk_norm else ():
        yield ModelTensor(f"{prefix}.self_attention.{name}.weight", Component.norms, (width,), Spread.whole)


def _dense(model: ModelConfig, prefix: str) -> Iterator[ModelTensor]:
    ffn, hidden = model.ffn_hidden_size or 0, model.hidden_size
    yield ModelTensor(f"{prefix}.mlp.linear_fc1.weight", Component.dense_mlp, (2, ffn, hidden), Spread.tp)
    yield ModelTensor(f"{prefix}.mlp.linear_fc2.weight", Component.dense_mlp, (hidden, ffn), Spread.tp)


def _experts(model: ModelConfig, prefix: str) -> Iterator[ModelTensor]:
    moe, hidden = model.moe, model.hidden_size
    assert moe is not None
    count, ffn, kind = moe.num_experts, moe.ffn_hidden_size, Component.experts
    yield ModelTensor(f"{prefix}.mlp.router.weight", Component.router, (count, hidden), Spread.whole)
    yield ModelTensor(f"{prefix}.mlp.experts.gate_up", kind, (count, 2, ffn, hidden), Spread.experts)
    yield ModelTensor(f"{prefix}.mlp.experts.down", kind, (count, hidden, ffn), Spread.experts)

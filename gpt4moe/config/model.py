"""The transformer's shape (Mixtral's architecture: RMSNorm, RoPE, grouped-query attention, SwiGLU, no biases)."""

from dataclasses import dataclass
from enum import Enum
from math import isqrt

from gpt4moe.config.missing import MISSING
from gpt4moe.config.moe import MoEConfig
from gpt4moe.config.planned import MlaConfig, PlannedConfig
from gpt4moe.errors import ConfigError


class AttentionKind(str, Enum):
    """What a layer's attention is."""

    grouped_query = "grouped_query"
    """Heads of queries share heads of keys and values (arXiv:2305.13245)."""
    latent = "latent"
    """Keys and values from one latent (ModelConfig.mla): the planner counts it, the trainer cannot build it."""

    __hash__ = str.__hash__  # the planner looks kinds up millions of times


class MlpKind(str, Enum):
    """What stands after a layer's attention."""

    dense = "dense"
    """One SwiGLU that every token goes through."""
    moe = "moe"
    """A router and experts."""

    __hash__ = str.__hash__


@dataclass(frozen=True, slots=True)
class LayerKind:
    """What one layer is made of.

    Tables that are keyed by a kind: tensors and widths (architecture.table), modules (model.specs), activations
    (planner.activations) and workspace (planner.memory), what tensor parallelism must divide (parallel.legality). A new
    attention, with cross-attention for example, is one more AttentionKind with a row in each of these tables.
    """

    attention: AttentionKind
    mlp: MlpKind

    @property
    def has_experts(self) -> bool:
        return self.mlp is MlpKind.moe


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    name: str = MISSING
    """For people: shown in logs, the report and the model card."""
    num_layers: int = MISSING
    hidden_size: int = MISSING
    num_attention_heads: int = MISSING
    num_query_groups: int | None = None
    """Heads of keys and values (grouped-query attention); null: as many as num_attention_heads."""
    head_dim: int | None = None
    """Width of a head; null: hidden_size / num_attention_heads. The heads together need not be hidden_size wide."""
    qk_norm: bool = False
    """RMSNorm over each head's query and key, before the rotary embedding (Qwen3, arXiv:2505.09388)."""
    ffn_hidden_size: int | None = None
    """Inner width of dense layers; null where every layer is MoE."""
    seq_length: int = MISSING
    """Tokens of a sample."""
    vocab_size: int = MISSING
    """Rows of the embedding, equal to the tokenizer's vocabulary, the same on every layout (no padding by tp)."""
    tied_embeddings: bool = False
    """The output layer shares the embedding's weight."""
    rope_theta: float = 10000.0
    """Base of the rotary embedding (arXiv:2104.09864)."""
    norm_epsilon: float = 1e-5
    init_std: float = 0.02
    """Standard deviation of initial weights; projections back into the residual stream get / sqrt(2 * num_layers)."""
    moe: MoEConfig | None = None
    """null: a dense model."""
    mla: MlaConfig | None = None
    """Multi-head latent attention, for the planner alone; null: grouped-query attention."""
    planned: PlannedConfig | None = None
    """Parts of published models that the planner counts and the trainer refuses."""

    @property
    def query_groups(self) -> int:
        return self.num_query_groups or self.num_attention_heads

    @property
    def head_size(self) -> int:
        """Width of a head, given or derived."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def forward_settings(self) -> dict[str, object]:
        """Settings that change the forward pass but no tensor's shape: a mismatch would load without an error."""
        chosen = {} if self.moe is None else {
            "moe.top_k": self.moe.top_k, "moe.router.kind": self.moe.router.kind.value,
            "moe.router.scaling_factor": float(self.moe.router.scaling_factor),
            "moe.router.num_groups": self.moe.router.num_groups, "moe.router.group_topk": self.moe.router.group_topk,
        }  # fmt: skip
        return {
            "num_attention_heads": self.num_attention_heads,
            "num_query_groups": self.query_groups,
            "rope_theta": float(self.rope_theta),
            "norm_epsilon": float(self.norm_epsilon),
            **chosen,
        }

    @property
    def layer_kinds(self) -> list[LayerKind]:
        """The kind of each layer."""
        attention = AttentionKind.grouped_query if self.mla is None else AttentionKind.latent
        dense, moe = LayerKind(attention, MlpKind.dense), LayerKind(attention, MlpKind.moe)
        if self.moe is None:
            return [dense] * self.num_layers
        return [moe if has_experts else dense for has_experts in self.moe.layers(self.num_layers)]

    @property
    def moe_layers(self) -> list[bool]:
        """For each layer, whether its MLP is a mixture of experts."""
        return [kind.has_experts for kind in self.layer_kinds]

    def validate(self) -> None:
        for name in ("num_layers", "hidden_size", "num_attention_heads", "seq_length", "vocab_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"model.{name}={getattr(self, name)} is below 1.", f"Set model.{name}.")
        if self.head_dim is not None and (self.head_dim < 1 or self.head_dim % 2):
            raise ConfigError(
                f"model.head_dim={self.head_dim}; rotary embeddings turn pairs, so it must be even and positive.",
                "Set model.head_dim to an even number (128 is usual), or to null.",
            )
        if self.head_dim is None and self.hidden_size % (2 * self.num_attention_heads):
            raise ConfigError(
                f"model.hidden_size={self.hidden_size} over model.num_attention_heads={self.num_attention_heads} "
                f"gives heads of {self.hidden_size / self.num_attention_heads:g}; rotary embeddings need even ones.",
                f"Set model.hidden_size to a multiple of {2 * self.num_attention_heads}, or set model.head_dim.",
            )
        if self.num_query_groups is not None and (
            self.num_query_groups < 1 or self.num_attention_heads % self.num_query_groups
        ):
            raise ConfigError(
                f"model.num_query_groups={self.num_query_groups} does not divide "
                f"model.num_attention_heads={self.num_attention_heads}.",
                f"Set model.num_query_groups to one of {divisors(self.num_attention_heads)}.",
            )
        for part in (self.mla, self.planned):
            if part is not None:
                part.validate()
        if self.moe is not None:
            self.moe.validate(self.num_layers)
        if not all(self.moe_layers) and not self.ffn_hidden_size:
            raise ConfigError(
                f"model.ffn_hidden_size is not set, but {self.moe_layers.count(False)} of {self.num_layers} layers "
                "are dense.",
                f"Set model.ffn_hidden_size (8/3 of hidden_size is usual: {8 * self.hidden_size // 3}).",
            )


def divisors(number: int) -> list[int]:
    """All divisors of a positive number, ascending."""
    small = [d for d in range(1, isqrt(number) + 1) if number % d == 0]
    return small + [number // d for d in reversed(small) if d * d != number]

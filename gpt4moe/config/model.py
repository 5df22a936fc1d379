"""The transformer's shape (Mixtral's architecture: RMSNorm, RoPE, grouped-query attention, SwiGLU, no biases)."""

from dataclasses import dataclass
from enum import Enum
from math import isqrt

from gpt4moe.config import MISSING
from gpt4moe.config.lora import LoraConfig
from gpt4moe.config.moe import MoEConfig
from gpt4moe.config.vision import VisionConfig
from gpt4moe.errors import ConfigError


class AttentionKind(str, Enum):
    """What a layer's attention is."""

    grouped_query = "grouped_query"
    """Heads of queries share heads of keys and values (arXiv:2305.13245)."""
    latent = "latent"
    """Keys and values come from one latent (ModelConfig.mla). The planner counts it; the trainer cannot build it."""

    __hash__ = str.__hash__  # the planner looks kinds up millions of times


class MlpKind(str, Enum):
    """What follows the attention of a layer."""

    dense = "dense"
    """One SwiGLU, which every token passes."""
    moe = "moe"
    """A router and experts."""

    __hash__ = str.__hash__


@dataclass(frozen=True, slots=True)
class LayerKind:
    """The kind of one layer: its attention and its MLP.

    A new attention (cross-attention, for example) is one more AttentionKind, with a row in each of these tables:
    architecture.table (tensors, widths), model.specs (modules), planner.activations, planner.memory (workspace) and
    parallel.legality (sizes that tensor parallelism must divide).
    """

    attention: AttentionKind
    mlp: MlpKind

    @property
    def has_experts(self) -> bool:
        return self.mlp is MlpKind.moe


@dataclass(kw_only=True, slots=True)
class MlaConfig:
    """Multi-head latent attention: keys and values come from one latent (arXiv:2405.04434, section 2.1)."""

    q_lora_rank: int | None = None
    """Width of the latent of the queries; null: queries are made from the hidden state directly."""
    kv_lora_rank: int = MISSING
    """Width of the latent of keys and values."""
    qk_nope_head_dim: int = MISSING
    """Width of the part of a query and a key that has no rotary embedding, per head."""
    qk_rope_head_dim: int = MISSING
    """Width of the part with the rotary embedding. All heads share this part of the key."""
    v_head_dim: int = MISSING
    """Width of a head's value."""

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    def validate(self) -> None:
        for name in ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"model.mla.{name}={value} is below 1.", f"Set model.mla.{name}.")


@dataclass(kw_only=True, slots=True)
class PlannedConfig:
    """Parts of published models that the planner counts and the trainer cannot build (parallel.legality refuses them).

    With every field at its default, the trainer can build the model.
    """

    attention_biases: bool = False
    """The query, key, value and output projections have biases."""
    mlp_biases: bool = False
    """Dense layers, experts and the router have biases."""
    norm_biases: bool = False
    """Norms are LayerNorm, which has a bias, instead of RMSNorm."""
    ungated_mlp: bool = False
    """An MLP has two matrices and GELU instead of SwiGLU's three matrices."""
    attention_sinks: bool = False
    """Each head has one learned logit, added to the sum of its softmax."""
    learned_positions: bool = False
    """Positions are a learned embedding [model.seq_length, hidden_size] instead of rotary."""
    sliding_window: int | None = None
    """In every second layer a token attends to this many tokens; null: to all tokens before it, in every layer."""

    def validate(self) -> None:
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ConfigError(
                f"model.planned.sliding_window={self.sliding_window} is below 1.",
                "Set the tokens of a window, or null for attention to everything before.",
            )


MOST_LAYERS = 10_000
_NUMBERS = {"norm_epsilon": (1e-5, 1.0), "init_std": (0.02, 10.0), "rope_theta": (10_000, 1e15)}
"""Key of a model -> a usual value, and the most that still means something; NaN is none of them."""


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
    """Width of a head; null: hidden_size / num_attention_heads. num_attention_heads * head_dim may differ from
    hidden_size."""
    qk_norm: bool = False
    """RMSNorm over each head's query and key, before the rotary embedding (Qwen3, arXiv:2505.09388)."""
    ffn_hidden_size: int | None = None
    """Inner width of the MLP of dense layers; null if every layer is MoE."""
    seq_length: int = MISSING
    """Tokens of a sample."""
    vocab_size: int = MISSING
    """Rows of the embedding: the size of the tokenizer's vocabulary. Not padded to a multiple of tp."""
    tied_embeddings: bool = False
    """The output layer uses the embedding's weight."""
    rope_theta: float = 10000.0
    """Base of the rotary embedding (arXiv:2104.09864)."""
    norm_epsilon: float = 1e-5
    init_std: float = 0.02
    """Standard deviation of initial weights; projections into the residual stream: init_std / sqrt(2 * num_layers)."""
    moe: MoEConfig | None = None
    """null: a dense model."""
    mla: MlaConfig | None = None
    """Multi-head latent attention, which only the planner knows; null: grouped-query attention."""
    planned: PlannedConfig | None = None
    """Parts that only the planner knows; null: none."""
    vision: VisionConfig | None = None
    """Resampler and gated cross-attention of a model that reads images; null: a text model."""
    lora: LoraConfig | None = None
    """The adapters of stage.lora, because they are tensors of the model. RunConfig copies them: set stage.lora."""

    @property
    def query_groups(self) -> int:
        return self.num_query_groups or self.num_attention_heads

    @property
    def head_size(self) -> int:
        """Width of a head: head_dim, or else hidden_size / num_attention_heads."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def forward_settings(self) -> dict[str, object]:
        """Settings that change the forward pass but no tensor's shape. Loading would not notice that they differ."""
        chosen = {} if self.moe is None else {
            "moe.top_k": self.moe.top_k, "moe.router.kind": self.moe.router.kind.value,
            "moe.router.scaling_factor": float(self.moe.router.scaling_factor),
            "moe.router.num_groups": self.moe.router.num_groups, "moe.router.group_topk": self.moe.router.group_topk,
        }  # fmt: skip
        if self.vision is not None:
            resampler = self.vision.resampler
            chosen = chosen | {"vision.resampler.num_attention_heads": resampler.num_attention_heads}
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

    def has_gated_block(self, layer: int) -> bool:
        """Whether gated cross-attention to images stands before a layer, by its index in the whole model."""
        return self.vision is not None and layer % self.vision.cross_attention_every == 0

    @property
    def moe_layers(self) -> list[bool]:
        """For each layer, whether its MLP is a mixture of experts."""
        return [kind.has_experts for kind in self.layer_kinds]

    def validate(self) -> None:
        for name in ("num_layers", "hidden_size", "num_attention_heads", "seq_length", "vocab_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"model.{name}={getattr(self, name)} is below 1.", f"Set model.{name}.")
        if self.num_layers > MOST_LAYERS:
            raise ConfigError(
                f"model.num_layers={self.num_layers} is above {MOST_LAYERS}: its plan alone would take minutes.",
                f"Set model.num_layers to {MOST_LAYERS} or fewer.",
            )
        for name, (usual, most) in _NUMBERS.items():
            if not 0 < getattr(self, name) <= most:
                raise ConfigError(
                    f"model.{name}={getattr(self, name):g} is not above 0 and at most {most:g}.",
                    f"Set model.{name}={usual:g}, which is usual.",
                )
        if self.head_dim is not None and (self.head_dim < 1 or self.head_dim % 2):
            raise ConfigError(
                f"model.head_dim={self.head_dim}; rotary embeddings rotate pairs, so it must be even and positive.",
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
        for part in (self.mla, self.planned, self.vision):
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

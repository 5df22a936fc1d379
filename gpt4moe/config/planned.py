"""Parts of published models that the planner counts and the trainer cannot build (parallel.legality refuses them)."""

from dataclasses import dataclass

from gpt4moe.config.missing import MISSING
from gpt4moe.errors import ConfigError


@dataclass(kw_only=True, slots=True)
class MlaConfig:
    """Multi-head latent attention: keys and values come from one latent (arXiv:2405.04434, section 2.1)."""

    q_lora_rank: int | None = None
    """Width of the latent that queries are made of; null: they are made of the hidden state."""
    kv_lora_rank: int = MISSING
    """Width of the latent that keys and values are made of."""
    qk_nope_head_dim: int = MISSING
    """Width of the part of a head's query and key that has no position."""
    qk_rope_head_dim: int = MISSING
    """Width of the part that has a rotary position; all heads share the key's."""
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
    """With every field at its default, the model has nothing that the trainer cannot build."""

    attention_biases: bool = False
    """Of the query, key, value and output projections."""
    mlp_biases: bool = False
    """Of dense layers, experts and the router."""
    norm_biases: bool = False
    """LayerNorm in RMSNorm's place."""
    ungated_mlp: bool = False
    """Two matrices and GELU instead of SwiGLU's three."""
    attention_sinks: bool = False
    """One learned logit a head, in the softmax's sum."""
    learned_positions: bool = False
    """An embedding of model.seq_length positions instead of rotary ones."""
    sliding_window: int | None = None
    """Tokens that a token of every second layer attends to; null: all before it, in every layer."""

    def validate(self) -> None:
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ConfigError(
                f"model.planned.sliding_window={self.sliding_window} is below 1.",
                "Set the tokens of a window, or null for attention to everything before.",
            )

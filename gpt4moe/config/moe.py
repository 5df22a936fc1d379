"""The mixture-of-experts part of a model: experts, which layers have them, and their router."""

from dataclasses import dataclass, field
from enum import Enum

from gpt4moe.config.missing import MISSING
from gpt4moe.errors import ConfigError


class RouterKind(str, Enum):
    """How tokens choose experts."""

    topk = "topk"
    switch = "switch"


class DropPolicy(str, Enum):
    """Which tokens an over-full expert lets go."""

    probability = "probability"
    position = "position"


@dataclass(kw_only=True, slots=True)
class RouterConfig:
    kind: RouterKind = RouterKind.topk
    """topk: softmax, renormalised over the chosen (Mixtral). switch: top-1, weighted by the raw probability."""
    load_balancing_coefficient: float = 0.01
    """Weight of the load-balancing loss, per MoE layer; 0 turns it off. Pooled over one micro-batch."""
    z_loss_coefficient: float = 0.0
    """Weight of the router z-loss, per MoE layer; 0 turns it off."""
    capacity_factor: float | None = None
    """Slots of an expert = ceil(factor * tokens * top_k / num_experts) per micro-batch; null: no token is dropped."""
    drop_policy: DropPolicy = DropPolicy.probability
    """With a capacity: keep the most probable tokens, or the earliest."""

    def validate(self, top_k: int) -> None:
        if self.kind is RouterKind.switch and top_k != 1:
            raise ConfigError(
                f"model.moe.router.kind=switch routes to one expert, but model.moe.top_k={top_k}.",
                "Set model.moe.top_k=1, or router@model.moe.router=top2.",
            )
        if self.kind is RouterKind.topk and top_k == 1:
            raise ConfigError(
                "model.moe.router.kind=topk with model.moe.top_k=1 renormalises every weight to 1.0: the router "
                "would get no gradient from the language model.",
                "Set model.moe.top_k=2 or more, or router@model.moe.router=switch.",
            )
        if self.capacity_factor is not None and self.capacity_factor <= 0:
            raise ConfigError(
                f"model.moe.router.capacity_factor={self.capacity_factor} leaves experts without slots.",
                "Set it above 0 (1.25 is usual), or null to drop nothing.",
            )
        for name in ("load_balancing_coefficient", "z_loss_coefficient"):
            if getattr(self, name) < 0:
                raise ConfigError(f"model.moe.router.{name}={getattr(self, name)} is negative.", "Set 0 or more.")


@dataclass(kw_only=True, slots=True)
class MoEConfig:
    num_experts: int = MISSING
    """Experts of one MoE layer, over all ranks."""
    ffn_hidden_size: int = MISSING
    """Inner width of one expert (SwiGLU: three matrices of hidden_size x ffn_hidden_size)."""
    top_k: int = 2
    """Experts a token goes to."""
    layer_pattern: list[int] | None = None
    """One 1 (MoE) or 0 (dense) per layer; null: every layer is MoE."""
    router: RouterConfig = field(default_factory=RouterConfig)

    def validate(self, num_layers: int) -> None:
        for name in ("num_experts", "ffn_hidden_size", "top_k"):
            if getattr(self, name) < 1:
                raise ConfigError(f"model.moe.{name}={getattr(self, name)} is below 1.", f"Set model.moe.{name}.")
        if self.top_k > self.num_experts:
            raise ConfigError(
                f"model.moe.top_k={self.top_k} is more than model.moe.num_experts={self.num_experts}.",
                f"Set model.moe.top_k to {self.num_experts} or less.",
            )
        pattern = self.layer_pattern
        if pattern is not None and (len(pattern) != num_layers or set(pattern) - {0, 1} or not any(pattern)):
            raise ConfigError(
                f"model.moe.layer_pattern has {len(pattern)} entries {pattern}; model.num_layers={num_layers}.",
                "Give one 0 (dense) or 1 (MoE) per layer with at least one 1, or null for MoE everywhere.",
            )
        self.router.validate(self.top_k)

"""LoRA: small trained matrices beside frozen ones (arXiv:2106.09685)."""

from dataclasses import dataclass, field
from math import inf

from gpt4moe.errors import ConfigError


@dataclass(kw_only=True, slots=True)
class LoraConfig:
    """y = W x + alpha / rank * B (A x): W is frozen, A [rank, in] and B [out, rank] are trained, and B is zero at
    first."""

    rank: int = 0
    """Rows of A and columns of B; 0: no adapters. A multiple of 8 for bf16 experts on GPUs."""
    alpha: float = 16.0
    """What an adapter adds is multiplied by alpha / rank."""
    targets: list[str] = field(default_factory=list)
    """Patterns, as of a shell, of the matrices that get an adapter (*linear_qkv*, *experts*). Empty: every matrix of
    attention, dense MLPs and experts."""
    dropout: float = 0.0
    """Only 0: no adapter here drops inputs."""

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def validate(self) -> None:
        if self.rank < 0:
            raise ConfigError(f"stage.lora.rank={self.rank} is negative.", "Set 16, say, or 0 for no adapters.")
        if not 0 < self.alpha < inf:
            raise ConfigError(f"stage.lora.alpha={self.alpha} is not above 0.", "Set stage.lora.alpha, 16 for example.")
        if self.dropout != 0:
            raise ConfigError(
                f"stage.lora.dropout={self.dropout}: adapters have no dropout here.", "Set stage.lora.dropout=0."
            )
        if self.targets and not self.rank:
            raise ConfigError(
                f"stage.lora.targets={self.targets}, but stage.lora.rank=0 makes no adapters.",
                "Set stage.lora.rank=16, say, or stage.lora.targets=[].",
            )

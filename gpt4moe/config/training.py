"""Groups run, training, stage, checkpoint, tracking, kernels: names, lengths, batch sizes, what is stored."""

from dataclasses import dataclass, field
from enum import Enum

from gpt4moe.config.missing import MISSING
from gpt4moe.errors import ConfigError


@dataclass(kw_only=True, slots=True)
class RunSection:
    name: str = MISSING
    """The run folder is <run.root>/<run.name>."""
    root: str = "runs"
    seed: int = 1234
    """Decides the initial weights and the order of samples."""

    def validate(self) -> None:
        if not self.name or "/" in self.name or self.name.startswith("."):
            raise ConfigError(f"run.name={self.name!r} cannot name a folder.", "Use letters, digits, '-' and '_'.")


@dataclass(kw_only=True, slots=True)
class TrainingConfig:
    steps: int = MISSING
    """Training stops after this step, counted from the run's beginning. Nothing else depends on it."""
    global_batch_size: int = MISSING
    """Sequences in one step, over all ranks."""
    micro_batch_size: int = 1
    """Sequences in one forward pass of a rank."""
    eval_every: int = 0
    """Steps between evaluations on held-out text; 0: only at the end."""
    eval_samples: int = 64
    """Held-out sequences of one evaluation; 0: none."""
    check_replicas_every: int = 100
    """Steps between checks that copies of one tensor on several ranks are bitwise equal; 0: never."""

    def validate(self) -> None:
        for name in ("steps", "global_batch_size", "micro_batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"training.{name}={getattr(self, name)} is below 1.", f"Set training.{name}.")
        if self.global_batch_size % self.micro_batch_size:
            raise ConfigError(
                f"training.global_batch_size={self.global_batch_size} is no multiple of "
                f"training.micro_batch_size={self.micro_batch_size}.",
                f"Set training.micro_batch_size to {self._nearest_micro_batch()}, which divides it.",
            )
        for name in ("eval_every", "eval_samples", "check_replicas_every"):
            if getattr(self, name) < 0:
                raise ConfigError(f"training.{name}={getattr(self, name)} is negative.", "Set 0 or more.")

    def _nearest_micro_batch(self) -> int:
        return next(size for size in range(self.micro_batch_size, 0, -1) if self.global_batch_size % size == 0)


class StageKind(str, Enum):
    """pretrain: next-token prediction on the text of data.path."""

    pretrain = "pretrain"


@dataclass(kw_only=True, slots=True)
class StageConfig:
    kind: StageKind = StageKind.pretrain
    """Which objective training has (objectives.stages)."""


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    every: int = 0
    """Steps between checkpoints; 0: only at the end (always written)."""
    keep: int = 3
    """How many of the newest checkpoints are kept; 0: all."""
    keep_every: int = 0
    """Checkpoints of steps divisible by this are never deleted; 0: none."""
    asynchronous: bool = True
    """Write in the background, from a copy in host memory (12 bytes a parameter of the rank); off: training waits."""
    load: str | None = None
    """Step folder or run folder from which a new run starts."""
    load_only: list[str] = field(default_factory=list)
    """Shell-like patterns of the tensors that `load` reads (decoder.layers.*, *.experts.*); other tensors keep their
    initial values. Empty: every tensor is read, and the checkpoint must have no others."""

    def validate(self) -> None:
        if min(self.every, self.keep, self.keep_every) < 0:
            raise ConfigError("checkpoint.every, keep and keep_every cannot be negative.", "Set 0 or more.")
        if self.load_only and self.load is None:
            raise ConfigError(
                f"checkpoint.load_only={self.load_only}, but checkpoint.load is not set.",
                "Set checkpoint.load to a step folder or a run folder, or checkpoint.load_only=[].",
            )


class WandbMode(str, Enum):
    """offline: files in the run folder. online: also wandb's server. disabled: no wandb."""

    offline = "offline"
    online = "online"
    disabled = "disabled"


@dataclass(kw_only=True, slots=True)
class TrackingConfig:
    wandb: WandbMode = WandbMode.offline
    project: str = "gpt4moe"
    entity: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    dashboard: str | None = None
    """YAML of the report's panels and of alerts; null: configs/dashboard.yaml."""
    count_bytes: bool = True
    """Count for the report the bytes that the first step of each launch sends between ranks. That step is slower."""


class AttentionKernel(str, Enum):
    """sdpa: torch's scaled_dot_product_attention (flash on GPUs). transformer_engine: NVIDIA's, when installed."""

    sdpa = "sdpa"
    transformer_engine = "transformer_engine"


class NormKernel(str, Enum):
    """torch: torch.nn.RMSNorm. apex: NVIDIA apex's fused RMSNorm (built from source)."""

    torch = "torch"
    apex = "apex"


class ExpertKernel(str, Enum):
    """auto: grouped_mm on GPUs, per_expert on CPUs. per_expert: one product an expert, written into slices."""

    auto = "auto"
    grouped_mm = "grouped_mm"
    per_expert = "per_expert"


@dataclass(kw_only=True, slots=True)
class KernelsConfig:
    attention: AttentionKernel = AttentionKernel.sdpa
    norm: NormKernel = NormKernel.torch
    experts: ExpertKernel = ExpertKernel.auto

"""Groups optimizer, schedule, engine, precision: how weights are updated."""

from dataclasses import dataclass, field
from enum import Enum
from math import inf

from gpt4moe.config import MISSING
from gpt4moe.errors import ConfigError, check_all


class OptimizerKind(str, Enum):
    """The update rule. config.optimizer_table has a row for each kind."""

    adamw = "adamw"


class ScheduleKind(str, Enum):
    """The learning rate after warm-up. wsd (warm-up, stable, decay): constant, then a decay over the last steps."""

    cosine = "cosine"
    linear = "linear"
    constant = "constant"
    wsd = "wsd"


class EngineKind(str, Enum):
    """The library that reduces gradients and updates weights. megatron: its DistributedDataParallel and
    DistributedOptimizer. deepspeed: its ZeRO-1."""

    megatron = "megatron"
    deepspeed = "deepspeed"


class Dtype(str, Enum):
    """Type of weights and activations. Gradients, master weights and optimizer states are always fp32."""

    fp32 = "fp32"
    bf16 = "bf16"


@dataclass(kw_only=True, slots=True)
class TensorSettings:
    """What some tensors have of their own in an update."""

    tensors: str = MISSING
    """A pattern, as of a shell, of their names (*router*, decoder.layers.3.*)."""
    lr_factor: float = 1.0
    """Their learning rate is that of the schedule times this. 0: they stand still, but their moments move."""
    weight_decay: float | None = None
    """In place of optimizer.weight_decay, also for one-dimensional parameters; null: as without this entry."""

    def validate(self) -> None:
        where = f"optimizer.by_pattern, {self.tensors}"
        for name, value in (("lr_factor", self.lr_factor), ("weight_decay", self.weight_decay)):
            if value is not None and not 0 <= value < inf:
                raise ConfigError(f"{where}: {name}={value} is not 0 or more.", f"Set {name}.")


@dataclass(kw_only=True, slots=True)
class OptimizerConfig:
    kind: OptimizerKind = OptimizerKind.adamw
    lr: float = MISSING
    """Peak learning rate."""
    weight_decay: float = 0.1
    """Decoupled weight decay. One-dimensional parameters (norms, biases) have none."""
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    clip_norm: float = 1.0
    """The largest global gradient norm of an update; larger gradients are scaled down to it. 0: no clipping."""
    by_pattern: list[TensorSettings] = field(default_factory=list)
    """Learning rates and weight decay of some tensors: [{tensors: "*router*", lr_factor: 0.1, weight_decay: 0}]. A
    tensor is in one entry at most."""

    def validate(self) -> None:
        if not 0 < self.lr < inf:
            raise ConfigError(f"optimizer.lr={self.lr} is not a rate above 0.", "Set optimizer.lr, 3e-4 for example.")
        for name in ("clip_norm", "weight_decay"):
            if not 0 <= getattr(self, name) < inf:
                raise ConfigError(f"optimizer.{name}={getattr(self, name)} is not 0 or more.", f"Set optimizer.{name}.")
        if not 0 < self.epsilon < inf:
            raise ConfigError(f"optimizer.epsilon={self.epsilon} is not above 0.", "Set optimizer.epsilon, 1e-8, say.")
        for settings in self.by_pattern:
            settings.validate()
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"optimizer.{name}={getattr(self, name)} is not in [0, 1).", f"Set optimizer.{name}.")


@dataclass(kw_only=True, slots=True)
class ScheduleConfig:
    kind: ScheduleKind = ScheduleKind.cosine
    total_steps: int = MISSING
    """The step at which the learning rate reaches its final value. training.steps does not change the learning rate."""
    warmup_steps: int = 0
    final_fraction: float = 0.1
    """The final learning rate, as a fraction of optimizer.lr."""
    decay_share: float | None = None
    """The learning rate decays in this last share of total_steps; only for kind wsd. 0.1 in the paper."""

    def validate(self) -> None:
        check_all(self._validate_steps, self._validate_own_keys)

    def _validate_steps(self) -> None:
        if not 0 <= self.warmup_steps <= self.total_steps:
            raise ConfigError(
                f"schedule.warmup_steps={self.warmup_steps} is not within schedule.total_steps={self.total_steps}.",
                "Set 0 <= schedule.warmup_steps <= schedule.total_steps.",
            )
        if not 0 <= self.final_fraction <= 1:
            raise ConfigError(f"schedule.final_fraction={self.final_fraction} is not within 0 and 1.", "Set 0.1, say.")

    def _validate_own_keys(self) -> None:
        """Checks keys that only one kind reads: that kind needs them, and every other kind refuses them."""
        kind = self.kind.value
        for owner, keys in SCHEDULE_KEYS.items():
            for key in keys:
                value = getattr(self, key)
                if self.kind is owner and value is None:
                    raise ConfigError(
                        f"schedule.kind={kind} needs schedule.{key}.",
                        f"Set schedule.{key}, or choose schedule={kind}, which sets it.",
                    )
                if self.kind is not owner and value is not None:
                    raise ConfigError(
                        f"schedule.{key}={value} is read by schedule.kind={owner.value} alone, not by {kind}.",
                        f"Choose schedule={owner.value}, or set schedule.{key}=null.",
                    )
        if self.kind is ScheduleKind.wsd:
            self._validate_decay()

    def _validate_decay(self) -> None:
        share, after_warmup = self.decay_share or 0.0, self.total_steps - self.warmup_steps
        if not 0 < share <= 1:
            raise ConfigError(f"schedule.decay_share={share:g} is not above 0 and at most 1.", "Set 0.1, say.")
        if share * self.total_steps > after_warmup:
            raise ConfigError(
                f"schedule.decay_share={share:g} of schedule.total_steps={self.total_steps} is a decay of "
                f"{share * self.total_steps:g} steps, but schedule.warmup_steps={self.warmup_steps} leaves "
                f"{after_warmup}.",
                "Lower schedule.decay_share or schedule.warmup_steps.",
            )
        if self.final_fraction == 0:
            raise ConfigError(
                "schedule.final_fraction=0 with schedule.kind=wsd, whose exponential decay never reaches 0.",
                "Set schedule.final_fraction=0.01, say, or schedule.kind=linear.",
            )


SCHEDULE_KEYS: dict[ScheduleKind, tuple[str, ...]] = {
    ScheduleKind.wsd: ("decay_share",),
}
"""Kind -> the keys of ScheduleConfig that only this kind reads. Every kind reads the other keys."""


@dataclass(kw_only=True, slots=True)
class EngineConfig:
    kind: EngineKind = EngineKind.megatron
    overlap_grad_reduce: bool = True
    """Reduce-scatter gradients during the backward pass. Megatron's engine only."""
    overlap_param_gather: bool = False
    """Gather the updated weights while what follows runs; a module waits for its own. Megatron's engine only, with
    overlap_grad_reduce, which cuts the buckets."""
    bucket_size: int | None = None
    """Elements of a gradient bucket; null: Megatron's default. Megatron's engine only."""
    offload_optimizer: bool = False
    """Keep master weights and optimizer states in host memory, and update them there. DeepSpeed's engine only."""

    def validate(self) -> None:
        if self.bucket_size is not None and self.bucket_size < 1:
            raise ConfigError(f"engine.bucket_size={self.bucket_size} is below 1.", "Set elements, or null.")
        kind = f"engine.kind={self.kind.value}"
        checks = {
            EngineKind.megatron: (
                (self.overlap_param_gather and not self.overlap_grad_reduce, "engine.overlap_param_gather=true",
                 "gathers bucket by bucket, and cuts buckets for engine.overlap_grad_reduce=true alone",
                 "Set engine.overlap_grad_reduce=true too, or engine.overlap_param_gather=false."),
                (self.offload_optimizer, "engine.offload_optimizer=true",
                 "would offload by Megatron-core 0.16.1's HybridDeviceOptimizer: its step fails for weights on a CPU, "
                 "so no layout of it has been compared with one process, and in bf16 it leaves the masters on the GPU",
                 "Set engine=deepspeed (same layouts and checkpoints), or engine.offload_optimizer=false."),
            ),
            EngineKind.deepspeed: (
                (self.overlap_grad_reduce, "engine.overlap_grad_reduce=true", "reduces after the backward pass",
                 "Set engine.overlap_grad_reduce=false, as engine=deepspeed does."),
                (self.overlap_param_gather, "engine.overlap_param_gather=true", "gathers weights in its own step",
                 "Set engine.overlap_param_gather=false."),
                (self.bucket_size is not None, f"engine.bucket_size={self.bucket_size}",
                 "reduces each parameter group at once", "Set engine.bucket_size=null."),
            ),
        }  # fmt: skip
        for wrong, setting, does, cure in checks[self.kind]:
            if wrong:
                raise ConfigError(f"{setting} with {kind}, which {does}.", cure)


@dataclass(kw_only=True, slots=True)
class PrecisionConfig:
    dtype: Dtype = Dtype.fp32

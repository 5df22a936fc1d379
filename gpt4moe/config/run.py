"""RunConfig: all groups of a run, and the checks that need two of them."""

from dataclasses import dataclass, field, fields, replace
from typing import Self

from gpt4moe.config.cluster import ClusterConfig
from gpt4moe.config.data import DataConfig, DataKind
from gpt4moe.config.kernels import ExpertKernel, KernelsConfig
from gpt4moe.config.model import ModelConfig
from gpt4moe.config.optimizer import Dtype, EngineConfig, OptimizerConfig, PrecisionConfig, ScheduleConfig
from gpt4moe.config.optimizer_table import optimizer_for
from gpt4moe.config.parallel import ParallelConfig
from gpt4moe.config.resilience import Remedy, ResilienceConfig
from gpt4moe.config.stage import StageConfig, StageKind
from gpt4moe.config.step_sizes import StepSizes, validate_both, validate_lengths
from gpt4moe.config.training import (
    CheckpointConfig,
    RunSection,
    TrackingConfig,
    TrainingConfig,
)
from gpt4moe.errors import ConfigError, check_all


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """The configuration of a run. config.load.load_run_config makes and checks it."""

    run: RunSection = field(default_factory=RunSection)
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    stage: StageConfig = field(default_factory=StageConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    resilience: ResilienceConfig = field(default_factory=ResilienceConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def __post_init__(self) -> None:
        if isinstance(self.model, ModelConfig):  # not so where the class is read as a schema
            self.model.lora = self.stage.lora if self.stage.lora.rank > 0 else None

    @property
    def attends_by_document(self) -> bool:
        """Whether samples have documents, in which attention stays."""
        return self.data.pack if self.has_rows else self.data.document_mask

    @property
    def has_rows(self) -> bool:
        """Whether samples are rows of whole documents: conversations, or documents with images."""
        is_vision = self.stage.kind is StageKind.vision and self.data.kind is DataKind.indexed
        return is_vision or self.stage.kind is StageKind.sft

    def validate(self) -> None:
        """Checks that do not depend on the number of ranks; parallel.legality has the others. Raises: ConfigError."""
        groups = [getattr(self, group.name) for group in fields(self)]
        checks = [group.validate for group in groups if hasattr(group, "validate")]
        own = (
            self._validate_lengths, self._validate_kernels, self._validate_optimizer, self._validate_lora,
            self._validate_documents, self._validate_vision, self._validate_going_back, self._validate_routing,
        )  # fmt: skip
        check_all(*checks, *own)
        # It counts the steps of both ramps, which only good ones have.
        validate_both(self.training.batch_ramp, self.training.length_ramp, self.training.global_batch_size)

    @property
    def step_sizes(self) -> StepSizes:
        """The size of every step, the samples and tokens of so many steps."""
        return self.training.step_sizes(self.model.seq_length)

    def at_step(self, step: int) -> Self:
        """The same run if all its steps had the size of step number `step`, from 1."""
        span = self.step_sizes.at_step(step)
        training = self.training.of_one_size(span.global_batch_size)
        return replace(self, training=training, model=replace(self.model, seq_length=span.seq_length))

    def _validate_lengths(self) -> None:
        training = self.training
        if not training.length_ramp:
            return
        validate_lengths(training.length_ramp, self.model.seq_length, training.micro_batch_size)
        if self.stage.kind is not StageKind.pretrain:
            raise ConfigError(
                f"training.length_ramp with stage.kind={self.stage.kind.value}: only running text can be cut into "
                "shorter samples.",
                "Set training.length_ramp=[].",
            )

    def _validate_optimizer(self) -> None:
        optimizer_for(self.optimizer.kind, self.engine.kind)

    def _validate_lora(self) -> None:
        if self.stage.lora.rank and self.checkpoint.load_only:
            raise ConfigError(
                f"checkpoint.load_only={self.checkpoint.load_only} with stage.lora.rank={self.stage.lora.rank}: what "
                "is not loaded would be frozen at its initial values.",
                "Set checkpoint.load_only=[].",
            )

    def _validate_documents(self) -> None:
        if self.data.document_mask and self.has_rows:
            raise ConfigError(
                f"data.document_mask=true with stage={self.stage.kind.value}: it is for samples cut from a stream of "
                "text, and no row of whole documents is one.",
                "Leave it false: packed documents (data.pack=true) never see each other.",
            )

    def _validate_vision(self) -> None:
        if self.stage.kind is StageKind.vision and self.model.vision is None:
            raise ConfigError(
                "stage=vision with model.vision=null: a text model has no parts that read images.",
                "Add vision parts, +vision@model.vision=tiny say, or choose another stage.",
            )
        if self.engine.overlap_param_gather and self.model.vision is not None:
            raise ConfigError(
                "engine.overlap_param_gather=true with model.vision: a rank that reads no image in a step would not "
                "wait for the resampler's weights.",
                "Set engine.overlap_param_gather=false.",
            )

    def _validate_routing(self) -> None:
        if self.training.record_routing and self.model.moe is None:
            raise ConfigError(
                f"training.record_routing={self.training.record_routing}, but {self.model.name} has no experts.",
                "Set training.record_routing=0, or choose a model with experts.",
            )

    def _validate_going_back(self) -> None:
        """Going back wants a checkpoint to go back to, and samples that are alike wherever they are read."""
        limits, checkpoint = self.resilience, self.checkpoint
        if not limits.may_go_back:
            return
        key = "on_nonfinite" if limits.on_nonfinite is Remedy.go_back else "on_spike"
        if not checkpoint.every:
            raise ConfigError(
                f"resilience.{key}=go_back with checkpoint.every=0: there is no checkpoint to go back to.",
                "Set checkpoint.every to the steps between checkpoints.",
            )
        if 0 < checkpoint.keep < limits.go_back_checkpoints:
            raise ConfigError(
                f"resilience.go_back_checkpoints={limits.go_back_checkpoints}, but checkpoint.keep={checkpoint.keep} "
                "leaves fewer.",
                f"Set checkpoint.keep={limits.go_back_checkpoints} or more.",
            )
        if self.training.length_ramp:
            raise ConfigError(
                f"resilience.{key}=go_back with training.length_ramp: the samples after those that are passed over "
                "have the length of other steps.",
                f"Set resilience.{key}=skip or stop, or training.length_ramp=[].",
            )

    def _validate_kernels(self) -> None:
        if self.kernels.experts is ExpertKernel.grouped_mm and self.precision.dtype is not Dtype.bf16:
            raise ConfigError(
                f"kernels.experts=grouped_mm with precision.dtype={self.precision.dtype.value}: on GPUs torch has the "
                "grouped product in bf16 only.",
                "Set precision=bf16, or kernels.experts=auto.",
            )

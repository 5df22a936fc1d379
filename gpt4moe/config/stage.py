"""Group stage: what is trained, with which objective."""

from dataclasses import dataclass, field
from enum import Enum

from gpt4moe.config.lora import LoraConfig
from gpt4moe.errors import ConfigError


class StageKind(str, Enum):
    """pretrain: next-token prediction on the text of data.path. sft: the same on its conversations, of whose tokens
    those of the assistant alone are learned. vision: the same on text with images, of whose model (model.vision) the
    resampler and the gated blocks alone are trained."""

    pretrain = "pretrain"
    sft = "sft"
    vision = "vision"


@dataclass(kw_only=True, slots=True)
class StageConfig:
    kind: StageKind = StageKind.pretrain
    """Decides the objective of training (objectives.stages). Part of a run's identity: another stage is another run."""
    train: list[str] = field(default_factory=list)
    """Patterns, as of a shell, of the tensors that are trained (*experts*, decoder.layers.3.*). The others are frozen.
    Empty: everything is trained. A router's buffers stand still where its matrix is frozen. Part of a run's
    identity."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Adapters that are trained while everything else is frozen. Part of a run's identity."""

    def validate(self) -> None:
        self.lora.validate()
        if self.lora.rank and self.train:
            raise ConfigError(
                f"stage.train={self.train} with stage.lora.rank={self.lora.rank}: with adapters "
                "nothing else is trained.",
                "Set stage.train=[], or stage.lora.rank=0.",
            )

"""Group stage: what is trained, with which objective."""

from dataclasses import dataclass
from enum import Enum


class StageKind(str, Enum):
    """pretrain: next-token prediction on the text of data.path. sft: the same on its conversations, of whose tokens
    those of the assistant alone are learned."""

    pretrain = "pretrain"
    sft = "sft"


@dataclass(kw_only=True, slots=True)
class StageConfig:
    kind: StageKind = StageKind.pretrain
    """Decides the objective of training (objectives.stages). Part of a run's identity: another stage is another run."""

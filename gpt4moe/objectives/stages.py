"""Which objective a stage of training has. A new stage is a value of config.stage.StageKind and a row here."""

from collections.abc import Callable

from gpt4moe.config.stage import StageConfig, StageKind
from gpt4moe.objectives.next_token import NextToken
from gpt4moe.objectives.objective import Objective

OBJECTIVES: dict[StageKind, Callable[[], Objective]] = {
    StageKind.pretrain: NextToken,
    StageKind.sft: NextToken,  # the data's loss_mask says which tokens are learned
    StageKind.vision: NextToken,
}


def objective_of(stage: StageConfig) -> Objective:
    return OBJECTIVES[stage.kind]()

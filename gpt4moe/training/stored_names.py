"""What a checkpoint calls the weights and buffers of a model. No torch."""

from gpt4moe.architecture.logical import logical_buffers, logical_shapes
from gpt4moe.checkpoint.storage import BUFFER, WEIGHT
from gpt4moe.config.model import ModelConfig


def stored_names(model: ModelConfig) -> list[str]:
    """KIND/NAME of everything of the model that must be there; moments are the optimizer's."""
    weights, buffers = (WEIGHT, logical_shapes(model)), (BUFFER, logical_buffers(model))
    return [f"{kind}/{name}" for kind, names in (weights, buffers) for name in names]

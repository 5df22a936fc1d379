"""Initial weights, the same numbers on every layout, device and precision (up to rounding)."""

from math import sqrt

import torch
from torch import nn

from gpt4moe.architecture.cuts import Start
from gpt4moe.config.model import ModelConfig
from gpt4moe.model.parameters import shards
from gpt4moe.parallel.groups import ProcessGroups
from gpt4moe.parallel.rng import normal_box


@torch.no_grad()
def initialize(chunks: list[nn.Module], model: ModelConfig, groups: ProcessGroups, seed: int) -> None:
    """Fills every parameter of this rank with its slice of the logical tensor's initial value."""
    deviation = {Start.normal: model.init_std, Start.residual: model.init_std / sqrt(2 * model.num_layers)}
    for parameter, shard, rule in shards(chunks, groups):
        if rule.start is Start.ones:
            parameter.fill_(1.0)
            continue
        box = normal_box(seed, shard.name, shard.global_shape, shard.offset, shard.shape)
        parameter.copy_((box * deviation[rule.start]).view(parameter.shape))

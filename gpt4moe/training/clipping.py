"""The global gradient norm and clipping, one rule for every engine.

    each element of the model's gradient once -> sum of squares in fp64 -> all ranks -> norm -> one factor for all

Upstream's own norms are not used. Megatron-core 0.16.1 sums in fp32 on CPUs: off by 1e-5 at two million elements, more
than any layout may move it. DeepSpeed 0.19.8 counts experts wrongly as soon as tp > 1, and its norm is a collective
over groups that a pipeline stage without experts does not enter.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import distributed

from gpt4moe.model.parameters import shards
from gpt4moe.parallel.groups import ProcessGroups
from gpt4moe.training.engine import OwnedRange


def counted_parameters(chunks: list[Any], groups: ProcessGroups) -> set[int]:
    """Ids of the parameters whose owned ranges this rank counts: not a replica over tp, not the copy of a tied
    embedding."""
    return {id(parameter) for parameter, shard, _ in shards(chunks, groups) if shard.is_writer}


def gradient_norm(owned: Iterable[OwnedRange], counted: set[int], device: torch.device) -> float:
    """The global norm of the reduced gradients, the same on every rank. Collective over the world.

    Args:
        owned: what this rank's optimizer owns; ranges of all data-parallel ranks together are disjoint and whole.
        counted: counted_parameters of this rank.
    """
    square = torch.zeros((), dtype=torch.float64, device=device)
    for part in owned:
        if id(part.parameter) in counted:
            square += torch.linalg.vector_norm(part.gradient, dtype=torch.float64).square()
    distributed.all_reduce(square)
    return float(square.sqrt())


def clip_gradients(owned: Iterable[OwnedRange], norm: float, clip_norm: float) -> None:
    """Scales the reduced gradients, whose global norm is `norm`, down to a norm of `clip_norm`; 0: no clipping."""
    if 0 < clip_norm < norm + 1e-6:
        gradients = [part.gradient for part in owned]
        if gradients:
            torch._foreach_mul_(gradients, clip_norm / (norm + 1e-6))

"""Capacity: an expert has a fixed number of slots per micro-batch; what does not fit is dropped.

The pool is one micro-batch gathered over tp x cp in sequence order, so the same assignments are dropped on every
layout. Padding takes no slot and makes none.
Shapes: T tokens of this rank, P tokens of the pool, K experts a token goes to, E experts.
"""

from math import ceil

import torch
from torch import Tensor

from gpt4moe.config.moe import DropPolicy
from gpt4moe.moe.pool import Pool


def capacity(num_tokens: int, num_experts: int, top_k: int, factor: float) -> int:
    """Slots of one expert for a pool of tokens: ceil(factor * tokens * top_k / experts) (arXiv:2101.03961, eq. 3)."""
    return ceil(factor * num_tokens * top_k / num_experts)


def kept_assignments(
    expert_index: Tensor, probability: Tensor, slots: int | Tensor, policy: DropPolicy, num_experts: int
) -> Tensor:
    """Which assignments of a whole pool get a slot.

    Args:
        expert_index: [P, K] int64, tokens in sequence order; E: no expert (padding), never kept.
        probability: [P, K], of the chosen expert; decides under DropPolicy.probability, ties go to the earlier token.
        slots: of one expert.
    Returns: [P, K] bool.
    """
    expert = expert_index.flatten()
    order = torch.arange(expert.numel(), device=expert.device)
    if policy is DropPolicy.probability:
        order = torch.argsort(probability.flatten(), descending=True, stable=True)
    by_expert = order[torch.argsort(expert[order], stable=True)]  # grouped by expert, best first inside
    counts = torch.bincount(expert, minlength=num_experts + 1)
    starts = torch.cumsum(counts, 0) - counts
    place = torch.arange(expert.numel(), device=expert.device) - starts[expert[by_expert]]
    keep = torch.empty_like(expert, dtype=torch.bool)
    keep[by_expert] = place < slots
    return keep.view_as(expert_index) & (expert_index < num_experts)


def kept_of_rank(
    expert_index: Tensor, probability: Tensor, *, num_experts: int, factor: float, policy: DropPolicy, pool: Pool,
    batch: int,
) -> Tensor:  # fmt: skip
    """kept_assignments of the pool's micro-batch, this rank's part: [T, K] bool. Collective over the pool.

    Args:
        expert_index: [T, K], E where a token is padding; T = S / tp / cp x batch.
    """
    index = pool.gather_in_order(expert_index, batch)
    chance = pool.gather_in_order(probability.detach(), batch)
    # On the device, in fp64 as `capacity` counts: how many tokens are no padding is only known there.
    num_tokens = (index[:, 0] < num_experts).sum(dtype=torch.float64)
    slots = torch.ceil(factor * num_tokens * index.shape[1] / num_experts)
    return pool.own(kept_assignments(index, chance, slots, policy, num_experts), batch)

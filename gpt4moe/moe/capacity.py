"""Capacity: an expert has a fixed number of slots per micro-batch; what does not fit is dropped.

The pool is one micro-batch gathered over tp x cp, so the same assignments are dropped on every layout.
Shapes: T tokens of this rank, P = T * (ranks of the pool) tokens of the pool, K experts a token goes to.
"""

from math import ceil

import torch
from torch import Tensor, distributed

from gpt4moe.config.moe import DropPolicy


def capacity(num_tokens: int, num_experts: int, top_k: int, factor: float) -> int:
    """Slots of one expert for a pool of tokens: ceil(factor * tokens * top_k / experts) (arXiv:2101.03961, eq. 3)."""
    return ceil(factor * num_tokens * top_k / num_experts)


def kept_assignments(expert_index: Tensor, probability: Tensor, slots: int, policy: DropPolicy) -> Tensor:
    """Which assignments of a whole pool get a slot.

    Args:
        expert_index: [P, K] int64, tokens in sequence order.
        probability: [P, K], of the chosen expert; decides under DropPolicy.probability, ties go to the earlier token.
        slots: of one expert.
    Returns: [P, K] bool.
    """
    expert = expert_index.flatten()
    order = torch.arange(expert.numel(), device=expert.device)
    if policy is DropPolicy.probability:
        order = torch.argsort(probability.flatten(), descending=True, stable=True)
    by_expert = order[torch.argsort(expert[order], stable=True)]  # grouped by expert, best first inside
    counts = torch.bincount(expert, minlength=int(expert.max()) + 1 if expert.numel() else 1)
    starts = torch.cumsum(counts, 0) - counts
    place = torch.arange(expert.numel(), device=expert.device) - starts[expert[by_expert]]
    keep = torch.empty_like(expert, dtype=torch.bool)
    keep[by_expert] = place < slots
    return keep.view_as(expert_index)


def kept_of_rank(
    expert_index: Tensor, probability: Tensor, *, num_experts: int, factor: float, policy: DropPolicy,
    pool: distributed.ProcessGroup,
) -> Tensor:  # fmt: skip
    """kept_assignments of the pool's micro-batch, this rank's part: [T, K] bool. Collective over `pool` (tp x cp)."""
    num_tokens, top_k = expert_index.shape
    ranks = pool.size()
    index, chance = expert_index, probability.detach()
    if ranks > 1:
        index = expert_index.new_empty(ranks * num_tokens, top_k)
        chance = probability.new_empty(ranks * num_tokens, top_k)
        distributed.all_gather_into_tensor(index, expert_index.contiguous(), group=pool)
        distributed.all_gather_into_tensor(chance, probability.detach().contiguous(), group=pool)
    slots = capacity(ranks * num_tokens, num_experts, top_k, factor)
    keep = kept_assignments(index, chance, slots, policy)
    return keep.view(ranks, num_tokens, top_k)[pool.rank()]

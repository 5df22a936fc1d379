"""A layer's auxiliary losses over its pool: what is summed there, and the one all-reduce that sums it.

    routing of T tokens -> sums [G, E] of probability, [G, E] of assignments, [G] tokens, z -> pool -> two scalars

G groups share one loss: the micro-batch (1), or each of its B sequences. Padding tokens are in no sum. The vector that
is reduced has the same length on every rank, whatever tokens it has.
"""

import torch
from deepspeed.moe.ep_count import count_tokens_per_expert
from torch import Tensor

from gpt4moe.config.moe import LoadBalancingScope, RouterConfig
from gpt4moe.moe.losses import load_balancing_loss, z_loss_terms
from gpt4moe.moe.pool import Pool
from gpt4moe.moe.routers.base import Routing


def auxiliary_losses(
    routing: Routing, real_T: Tensor | None, *, settings: RouterConfig, load_share: Tensor | None, pool: Pool,
    batch: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Load-balancing and z-loss, scaled by their coefficients, the same on every rank of the pool. Collective over it.

    Args:
        real_T: False for padding; None: every token is real.
        load_share: f_e of the step before, for LoadBalancingScope.global_batch.
        batch: B; tokens lie in the order [S, B].
    """
    groups = batch if settings.load_balancing_scope is LoadBalancingScope.sequence else 1
    num_experts = routing.probability.shape[1]
    probability, z_terms = routing.probability, z_loss_terms(routing.logits)
    if real_T is not None:
        probability, z_terms = probability * real_T.unsqueeze(1), z_terms * real_T
    real = torch.ones_like(z_terms) if real_T is None else real_T.float()
    parts = [
        _by_group(probability, groups).flatten(),
        count_assignments(routing.preferred_index, real_T, num_experts, groups=groups).flatten().float(),
        _by_group(real, groups),
        z_terms.sum().view(1),
    ]
    probability_sum, assigned, num_tokens, z_sum = pool.sum(torch.cat(parts)).split([part.numel() for part in parts])
    share = assigned.view(groups, -1) if load_share is None else load_share.unsqueeze(0)
    balance = load_balancing_loss(probability_sum.view(groups, -1), share, num_tokens)
    z_loss = z_sum.squeeze(0) / num_tokens.sum().clamp_min(1)
    return settings.load_balancing_coefficient * balance, settings.z_loss_coefficient * z_loss


def count_assignments(index_TK: Tensor, real_T: Tensor | None, num_experts: int, *, groups: int = 1) -> Tensor:
    """Assignments of real tokens to each expert, [G, E] int; with G > 1 token t is of group t mod G (order [S, B])."""
    slot = index_TK
    if groups > 1:
        slot = slot + num_experts * (torch.arange(len(index_TK), device=slot.device) % groups).unsqueeze(1)
    if real_T is not None:
        slot = slot.masked_fill(~real_T.unsqueeze(1), groups * num_experts)
    return count_tokens_per_expert(slot, groups * num_experts + 1)[:-1].view(groups, num_experts)


def _by_group(value: Tensor, groups: int) -> Tensor:
    """Sums [T, ...] over the tokens of each group: [G, ...]."""
    return value.view(-1, groups, *value.shape[1:]).sum(dim=0)

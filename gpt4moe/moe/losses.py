"""Auxiliary losses of a router: what they sum over the micro-batch, their equations, how they join the backward pass.

    routing of T tokens -> sums [G, E] of probability, [G, E] of assignments, [G] tokens, z -> one all-reduce over the
    pool (pool.py) -> two scalars -> attached to the layer's output

G groups share one loss: the micro-batch (1), or each of its B sequences. Padding tokens are in no sum. The vector that
is reduced has the same length on every rank, whatever tokens it has.
"""

from typing import Any

import torch
from deepspeed.moe.ep_count import count_tokens_per_expert
from torch import Tensor
from torch.autograd.function import once_differentiable

from gpt4moe.config.moe import LoadBalancingScope, RouterConfig
from gpt4moe.moe.pool import TokenPool
from gpt4moe.moe.routers.base import Routing


def auxiliary_losses(
    routing: Routing, real_T: Tensor | None, *, load: Tensor, settings: RouterConfig, load_share: Tensor | None,
    pool: TokenPool, batch: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Load-balancing and z-loss, scaled by their coefficients, the same on every rank of the pool. Collective over it.

    Args:
        real_T: False for padding; None: every token is real.
        load: [1, E], load_of the routing.
        load_share: f_e of the step before, for LoadBalancingScope.global_batch.
        batch: B; tokens lie in the order [S, B].
    """
    groups = batch if settings.load_balancing_scope is LoadBalancingScope.sequence else 1
    probability_sum, assigned, num_tokens, z_sum = pool.sum(*_sums(routing, real_T, load, groups))
    # Without padding the host knows it, which spares a dozen operations on one number.
    known = num_tokens if real_T is not None else max(len(routing.logits) * pool.size / groups, 1.0)
    share = assigned if load_share is None else load_share.unsqueeze(0)
    balance = load_balancing_loss(probability_sum, share, known)
    all_tokens = known * groups if isinstance(known, float) else known.sum().clamp_min(1)
    return settings.load_balancing_coefficient * balance, z_sum * (settings.z_loss_coefficient / all_tokens)


def _sums(routing: Routing, real_T: Tensor | None, load: Tensor, groups: int) -> tuple[Tensor, ...]:
    """Of this rank's tokens, fp32: probabilities [G, E], assignments [G, E], tokens [G], z."""
    if (sums := routing.sums) is not None:
        return sums.probability.unsqueeze(0), sums.load.unsqueeze(0), sums.tokens.unsqueeze(0), sums.z
    probability, z_terms = routing.probability, z_loss_terms(routing.logits)
    if real_T is None:
        counted = z_terms.new_full((groups,), len(z_terms) / groups)
    else:
        probability, z_terms = probability * real_T.unsqueeze(1), z_terms * real_T
        counted = _by_group(real_T.float(), groups)
    if groups > 1 or routing.preferred_index is not routing.expert_index:
        load = count_assignments(routing.preferred_index, real_T, probability.shape[1], groups=groups)
    return _by_group(probability, groups), load.float(), counted, z_terms.sum()


def load_balancing_loss(probability_sum: Tensor, assigned: Tensor, num_tokens: Tensor | float) -> Tensor:
    """Smallest (1.0) when every expert gets the same share of tokens: E * sum_e f_e * P_e, mean over G groups.

    f_e is the share of assignments that go to expert e, P_e its mean router probability.
    Switch Transformer, arXiv:2101.03961, equations 4-6, where f_e is divided by k for top-k; per sequence (G of them):
    DeepSeek-V3, arXiv:2412.19437, equations 17-20.

    Args:
        probability_sum: router probabilities summed over a group's tokens, [G, E] fp32; gradient flows through it.
        assigned: anything proportional to f_e: assignments before any drop, or shares, [G, E]; no gradient.
        num_tokens: of each group, [G]; a group without tokens does not count. A number: of every group, above 0.
    Returns: scalar, fp32; 0 when no group has tokens.
    """
    groups, num_experts = probability_sum.shape
    share = assigned.float() / assigned.sum(dim=-1, keepdim=True).clamp_min(1e-30)
    if isinstance(num_tokens, Tensor):
        factor = num_experts / (num_tokens.clamp_min(1) * (num_tokens > 0).sum().clamp_min(1)).unsqueeze(-1)
    else:
        factor = num_experts / (num_tokens * groups)
    return WeightedSum.apply(probability_sum, share * factor)


def z_loss_terms(logits: Tensor) -> Tensor:
    """Of each token, logsumexp(logits)^2, which keeps logits small (ST-MoE, arXiv:2202.08906, equation 5).

    Args:
        logits: [T, E] fp32.
    Returns: [T] fp32; the loss is their mean over the pool.
    """
    return SquaredLogSumExp.apply(logits)


class WeightedSum(torch.autograd.Function):
    """sum(value * weight), no gradient for the weight: one kernel in the backward pass."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return (value * weight).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0] * gradient[0], None


class SquaredLogSumExp(torch.autograd.Function):
    """logsumexp(logits)^2 of each row; d/dlogits = 2 logsumexp softmax."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        value = torch.logsumexp(logits, dim=-1)
        ctx.save_for_backward(logits, value)
        return value.square()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradient: Tensor) -> Tensor:
        logits, value = ctx.saved_tensors
        return torch.softmax(logits, dim=-1).mul_((2 * value * gradient[0]).unsqueeze(-1))


def load_of(routing: Routing, real_T: Tensor | None, num_experts: int) -> Tensor:
    """Assignments of this rank's real tokens to each expert, before any drop: [1, E] int32."""
    if routing.sums is not None:
        return routing.sums.load.to(torch.int32).unsqueeze(0)
    return count_assignments(routing.expert_index, real_T, num_experts)


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


class AttachLoss(torch.autograd.Function):
    """Returns `output` unchanged; in the backward pass `loss` gets the gradient `scale`.

    Pipeline stages return activations, not losses, so an auxiliary loss travels with the layer's output.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, loss: Tensor, scale: float) -> Tensor:
        ctx.scale, ctx.like = scale, loss
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        return gradient[0], torch.full_like(ctx.like, ctx.scale), None

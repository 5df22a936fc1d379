"""Auxiliary losses of a router over one micro-batch, and how they join the backward pass.

A micro-batch's tokens are spread over tp x cp (the pool). Sums over them are all-reduced in the forward pass and pass
their gradient through unchanged: every rank then holds the same loss and adds the gradient of its own tokens only,
and the router's weight gradient, summed over tp like every sequence-parallel weight's, is the whole one.
"""

from typing import Any

import torch
from torch import Tensor, distributed


def load_balancing_loss(probability_sum: Tensor, assigned: Tensor, num_tokens: int) -> Tensor:
    """Smallest (1.0) when every expert gets the same share of tokens: E * sum_e f_e * P_e.

    f_e is the share of assignments that go to expert e, P_e its mean router probability.
    Switch Transformer, arXiv:2101.03961, equations 4-6; for top-k, f_e is divided by k.

    Args:
        probability_sum: router probabilities summed over the pool's tokens, [E] fp32; gradient flows through it.
        assigned: assignments of each expert over the pool, before any drop, [E]; no gradient.
        num_tokens: of the pool.
    Returns: scalar, fp32.
    """
    share = assigned.float() / assigned.sum()
    return probability_sum.numel() * (share * (probability_sum / num_tokens)).sum()


def z_loss_sum(logits: Tensor) -> Tensor:
    """Sum over tokens of logsumexp(logits)^2, which keeps logits small (ST-MoE, arXiv:2202.08906, equation 5).

    Args:
        logits: [T, E] fp32.
    Returns: scalar, fp32; divide the pool's sum by its tokens.
    """
    return torch.logsumexp(logits, dim=-1).square().sum()


class PoolSum(torch.autograd.Function):
    """All-reduce forward, identity backward (see the module's docstring)."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, pool: distributed.ProcessGroup) -> Tensor:
        if pool.size() == 1:
            return value.view_as(value)
        total = value.detach().clone()
        distributed.all_reduce(total, group=pool)
        return total

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor, None]:
        return gradient[0], None


class AttachLoss(torch.autograd.Function):
    """Returns `output` unchanged; in the backward pass `loss` gets gradient `scale` beside it.

    Pipeline stages return activations, not losses, so an auxiliary loss rides on the layer's output.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, loss: Tensor, scale: float) -> Tensor:
        ctx.scale, ctx.like = scale, loss
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        return gradient[0], torch.full_like(ctx.like, ctx.scale), None

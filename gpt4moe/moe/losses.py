"""Auxiliary losses of a router, and how they join the backward pass.

A micro-batch's tokens are spread over tp x cp (the pool). Sums over them are all-reduced in the forward pass and pass
their gradient through unchanged: every rank then holds the same loss and adds the gradient of its own tokens only,
and the router's weight gradient, summed over tp like every sequence-parallel weight's, is the whole one.
"""

from typing import Any

import torch
from torch import Tensor, distributed


def load_balancing_loss(probability_sum: Tensor, assigned: Tensor, num_tokens: Tensor | float) -> Tensor:
    """Smallest (1.0) when every expert gets the same share of tokens: E * sum_e f_e * P_e, mean over G groups.

    f_e is the share of assignments that go to expert e, P_e its mean router probability.
    Switch Transformer, arXiv:2101.03961, equations 4-6, where f_e is divided by k for top-k; per sequence (G of them):
    DeepSeek-V3, arXiv:2412.19437, equations 17-20.

    Args:
        probability_sum: router probabilities summed over a group's tokens, [G, E] fp32; gradient flows through it.
        assigned: anything proportional to f_e: assignments before any drop, or shares, [G, E]; no gradient.
        num_tokens: of each group, [G]; a group without tokens does not count.
    Returns: scalar, fp32; 0 when no group has tokens.
    """
    num_tokens = torch.as_tensor(num_tokens, dtype=torch.float32, device=probability_sum.device)
    share = assigned.float() / assigned.sum(dim=-1, keepdim=True).clamp_min(1e-30)
    mean = probability_sum / num_tokens.clamp_min(1).unsqueeze(-1)
    loss = probability_sum.shape[-1] * (share * mean).sum(dim=-1)
    return loss.sum() / (num_tokens > 0).sum().clamp_min(1)


def z_loss_terms(logits: Tensor) -> Tensor:
    """Of each token, logsumexp(logits)^2, which keeps logits small (ST-MoE, arXiv:2202.08906, equation 5).

    Args:
        logits: [T, E] fp32.
    Returns: [T] fp32; the loss is their mean over the pool.
    """
    return torch.logsumexp(logits, dim=-1).square()


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

"""kernels.router=triton: the choice among softmax probabilities, and what losses and statistics sum of it.

    logits [T, E] --one kernel, one read--> probabilities, K best, their weights; sums of each block of tokens --> sums
    gradient [T, E] = of the weights, of the sums of probabilities and of the z-loss together, in one kernel

For the kinds whose scores are a softmax (config.moe.RouterTraits.is_softmax). Of equally probable experts the first is
chosen. A token whose logits have a NaN or +inf has NaN as weights, goes to the first K experts, and is counted there:
what is counted is always what is sent.
"""

import importlib
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gpt4moe.moe.routers.base import Choice, TokenSums

ELEMENTS = 1024
"""Logits that a program of the kernels has in registers, unless one token has more. 4,096 tokens of 8 experts are then
32 programs. Not measured."""
SCALARS = 4
"""Of a row of sums, behind those of each expert: z, entropy, margin, tokens."""


def chosen_by_kernel(
    logits: Tensor, token_id_T: Tensor | None, top_k: int, *, is_renormalised: bool
) -> tuple[Choice, TokenSums]:
    """What topk.py and switch.py make of logits [T, E] fp32, and sums over the real tokens.

    Args:
        token_id_T: int64, below 0: padding. None: every token is real.
    """
    chosen = SoftmaxChoice.apply(logits, token_id_T, top_k, is_renormalised)
    weight, probability_sum, z, index, probability, margin, rest = chosen
    experts = logits.shape[1]
    sums = TokenSums(
        probability=probability_sum, z=z, load=rest[:experts], entropy=rest[-3], margin=rest[-2], tokens=rest[-1]
    )
    return Choice(probability, index, weight, index, margin), sums


class SoftmaxChoice(torch.autograd.Function):
    """logits [T, E] -> weight [T, K], sums of probabilities [E] and of logsumexp^2; and what has no gradient: index
    [T, K], probability [T, E], margin [T], the other sums [E + 4]."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, token_id: Tensor | None, top_k: int, is_renormalised: bool) -> Any:
        logits = logits.contiguous()
        tokens, experts = logits.shape
        probability, (log_sum, margin) = torch.empty_like(logits), logits.new_empty(2, tokens)
        index = logits.new_empty(tokens, top_k, dtype=torch.int64)
        weight = logits.new_empty(tokens, top_k)
        blocks = logits.new_empty(num_blocks(tokens, experts), 2 * experts + SCALARS)
        kernels().choose(logits, token_id, probability, log_sum, index, weight, margin, blocks, is_renormalised)
        sums = blocks.sum(dim=0)
        rest = sums[experts:]
        ctx.save_for_backward(probability, log_sum, index, weight, token_id)
        ctx.is_renormalised = is_renormalised
        ctx.mark_non_differentiable(index, probability, margin, rest)
        return weight, sums[:experts], sums[2 * experts], index, probability, margin, rest

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        probability, log_sum, index, weight, token_id = ctx.saved_tensors
        given = [gradient.contiguous() for gradient in gradients[:3]]
        grad = torch.empty_like(probability)
        kernels().choice_gradients(
            probability, log_sum, index, weight, token_id, *given, grad, ctx.is_renormalised
        )  # fmt: skip
        return grad, None, None, None


def num_blocks(tokens: int, experts: int) -> int:
    """Programs of a kernel, each of which writes a row of sums."""
    return -(-tokens // tokens_of_block(experts))


def tokens_of_block(experts: int) -> int:
    """A power of two."""
    return max(1, ELEMENTS // columns_of_block(experts))


def columns_of_block(experts: int) -> int:
    """The number of experts, rounded up to a power of two."""
    return 1 << (experts - 1).bit_length()


def kernels() -> Any:
    """The module of Triton's kernels."""
    return importlib.import_module("gpt4moe.moe.routers.softmax_kernels")

"""Triton's kernels of softmax_choice.SoftmaxChoice, one each way. Triton is imported here, so only where it is chosen.

A program has a block of tokens with the logits of all experts, whose number is rounded up to a power of two. It writes
the sums of its tokens to a row of its own, and torch adds the rows: equal runs are equal.
"""

import triton
import triton.language as tl
from torch import Tensor

from gpt4moe.moe.routers.softmax_choice import columns_of_block, num_blocks, tokens_of_block


@triton.jit
def _choose(  # type: ignore[no-untyped-def]
    logits, token_id, probability, log_sum, index, weight, margin, blocks, tokens, experts,
    TOP_K: tl.constexpr, RENORMALISED: tl.constexpr, MASKED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    is_row, is_column = row < tokens, (column < experts)[None, :]
    inside = is_row[:, None] & is_column
    at = row[:, None] * experts + column[None, :]
    x = tl.where(is_column, tl.load(logits + at, mask=inside, other=0.0), -float("inf"))
    most = tl.max(x, 1)
    share = tl.exp(x - most[:, None])
    total = tl.sum(share, 1)
    p = share / total[:, None]
    log_total = most + tl.log(total)
    is_real = is_row
    if MASKED:
        is_real = is_row & (tl.load(token_id + row, mask=is_row, other=-1) >= 0)

    # 0 for NaN, which has no order: K different experts are then chosen still. Below 0: chosen before, or no expert.
    score = tl.where(is_column, tl.where(p == p, p, 0.0), -1.0)
    left, last = score, most
    for _ in range(TOP_K):
        last = tl.max(left, 1)
        left = tl.where(tl.argmax(left, 1)[:, None] == column[None, :], -1.0, left)
    is_chosen = (left < 0) & is_column
    next_best = tl.max(left, 1)
    gap = tl.where(next_best < 0, 0.0, last - next_best)
    scale = total
    if RENORMALISED:
        scale = tl.where(total == total, tl.sum(tl.where(is_chosen, share, 0.0), 1), total)
    left = score
    for k in range(TOP_K):
        expert = tl.argmax(left, 1)
        best = expert[:, None] == column[None, :]
        tl.store(index + row * TOP_K + k, expert.to(tl.int64), mask=is_row)
        tl.store(weight + row * TOP_K + k, tl.sum(tl.where(best, share, 0.0), 1) / scale, mask=is_row)
        left = tl.where(best, -1.0, left)
    tl.store(probability + at, p, mask=inside)
    tl.store(log_sum + row, log_total, mask=is_row)
    tl.store(margin + row, gap, mask=is_row)

    counted = is_real[:, None] & is_column
    of_block = blocks + tl.program_id(0).to(tl.int64) * (2 * experts + 4)
    tl.store(of_block + column, tl.sum(tl.where(counted, p, 0.0), 0), mask=column < experts)
    tl.store(of_block + experts + column, tl.sum((counted & is_chosen).to(tl.float32), 0), mask=column < experts)
    # A probability of 0 adds 0, though its logit may be -inf. A NaN shows.
    entropy = tl.sum(tl.where(counted & (p != 0), p * (log_total[:, None] - x), 0.0), 1)
    of_block += 2 * experts
    tl.store(of_block, tl.sum(tl.where(is_real, log_total * log_total, 0.0)))
    tl.store(of_block + 1, tl.sum(entropy))
    tl.store(of_block + 2, tl.sum(tl.where(is_real, gap, 0.0)))
    tl.store(of_block + 3, tl.sum(is_real.to(tl.float32)))


@triton.jit
def _gradients(  # type: ignore[no-untyped-def]
    probability, log_sum, index, weight, token_id, grad_weight, grad_sum, grad_z, grad, tokens, experts,
    TOP_K: tl.constexpr, RENORMALISED: tl.constexpr, MASKED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    is_row, is_column = row < tokens, column < experts
    inside = is_row[:, None] & is_column[None, :]
    at = row[:, None] * experts + column[None, :]
    p = tl.load(probability + at, mask=inside, other=0.0)
    is_real = is_row
    if MASKED:
        is_real = is_row & (tl.load(token_id + row, mask=is_row, other=-1) >= 0)
    of_sums = tl.load(grad_sum + column, mask=is_column, other=0.0)
    given = tl.where(is_real[:, None], of_sums[None, :], 0.0)  # gradients of probabilities
    mean = tl.zeros((ROWS,), dtype=tl.float32)
    if RENORMALISED:
        for k in range(TOP_K):
            w = tl.load(weight + row * TOP_K + k, mask=is_row, other=0.0)
            mean += w * tl.load(grad_weight + row * TOP_K + k, mask=is_row, other=0.0)
    direct = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)  # gradients of logits
    for k in range(TOP_K):
        of_weight = tl.load(grad_weight + row * TOP_K + k, mask=is_row, other=0.0)
        chosen = tl.load(index + row * TOP_K + k, mask=is_row, other=0)[:, None] == column[None, :]
        if RENORMALISED:
            w = tl.load(weight + row * TOP_K + k, mask=is_row, other=0.0)
            direct += tl.where(chosen, (w * (of_weight - mean))[:, None], 0.0)
        else:
            given += tl.where(chosen, of_weight[:, None], 0.0)
    of_z = tl.where(is_real, 2 * tl.load(log_sum + row, mask=is_row, other=0.0) * tl.load(grad_z), 0.0)
    inner = tl.sum(p * given, 1) - of_z
    tl.store(grad + at, direct + p * (given - inner[:, None]), mask=inside)


def choose(
    logits: Tensor, token_id: Tensor | None, probability: Tensor, log_sum: Tensor, index: Tensor, weight: Tensor,
    margin: Tensor, blocks: Tensor, is_renormalised: bool,
) -> None:  # fmt: skip
    """logits [T, E] fp32, token_id [T] int64 or None -> the others, blocks [num_blocks, 2E + 4]; all contiguous.

    A row of `blocks`, over the block's real tokens: sums of each expert's probability, tokens of each expert, and sums
    of logsumexp^2, entropy, margin and tokens.
    """
    tokens, experts = logits.shape
    if tokens:
        _choose[(len(blocks),)](
            logits, token_id, probability, log_sum, index, weight, margin, blocks, tokens, experts,
            TOP_K=index.shape[1], RENORMALISED=is_renormalised, **block(token_id, experts),
        )  # fmt: skip


def choice_gradients(
    probability: Tensor, log_sum: Tensor, index: Tensor, weight: Tensor, token_id: Tensor | None,
    grad_weight: Tensor, grad_sum: Tensor, grad_z: Tensor, grad: Tensor, is_renormalised: bool,
) -> None:  # fmt: skip
    """grad_weight [T, K], grad_sum [E], grad_z: a number -> grad [T, E], of the logits; all contiguous."""
    tokens, experts = probability.shape
    if tokens:
        _gradients[(num_blocks(tokens, experts),)](
            probability, log_sum, index, weight, token_id, grad_weight, grad_sum, grad_z, grad, tokens, experts,
            TOP_K=index.shape[1], RENORMALISED=is_renormalised, **block(token_id, experts),
        )  # fmt: skip


def block(token_id: Tensor | None, experts: int) -> dict[str, int | bool]:
    """Constants of both kernels."""
    return {
        "MASKED": token_id is not None,
        "ROWS": tokens_of_block(experts),
        "COLUMNS": columns_of_block(experts),
    }

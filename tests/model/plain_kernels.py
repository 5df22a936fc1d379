"""What our Triton kernels of rotary embedding, cross-entropy and router compute, in torch's operations: for CPUs."""

import torch
from torch import Tensor


class RotaryKernels:
    @staticmethod
    def split(mixed: Tensor, table: Tensor, query: Tensor, key: Tensor | None, value: Tensor | None) -> None:
        queries = mixed.shape[3] - (0 if key is None else 2)
        heads = mixed.float()
        query.copy_(_turned(heads[..., :queries, :], *table).flatten(2, 3))
        if key is not None and value is not None:
            key.copy_(_turned(heads[..., queries : queries + 1, :], *table).squeeze(3))
            value.copy_(mixed[..., queries + 1, :])

    @staticmethod
    def join(query: Tensor, key: Tensor | None, value: Tensor | None, table: Tensor, mixed: Tensor) -> None:
        queries, (cos, sin) = mixed.shape[3] - (0 if key is None else 2), table
        mixed[..., :queries, :] = _turned(query.unflatten(2, (mixed.shape[2], queries)).float(), cos, -sin)
        if key is not None and value is not None:
            mixed[..., queries, :] = _turned(key.float().unsqueeze(3), cos, -sin).squeeze(3)
            mixed[..., queries + 1, :] = value


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[S, B, G, heads, D] by angles of [S, D/2]."""
    cos, sin = (factor[:, None, None, None] for factor in (cos, sin))
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class CrossEntropyKernels:
    @staticmethod
    def sums(logits: Tensor, label: Tensor, found: Tensor, first: int) -> None:
        found[0] = logits.float().logsumexp(dim=1)
        found[1] = (logits.float() * _label(logits, label, first)).sum(dim=1)

    @staticmethod
    def gradients(given: Tensor, logits: Tensor, label: Tensor, log_sum: Tensor, grad: Tensor, first: int) -> None:
        share = (logits.float() - log_sum.unsqueeze(1)).exp() - _label(logits, label, first)
        grad.copy_(share * given.unsqueeze(1))


def _label(logits: Tensor, label: Tensor, first: int) -> Tensor:
    """1 in the column of each row's label, if it is here."""
    return (torch.arange(logits.shape[1]) + first == label.unsqueeze(1)).float()


class RouterKernels:
    @staticmethod
    def choose(
        logits: Tensor, token_id: Tensor | None, probability: Tensor, log_sum: Tensor, index: Tensor, weight: Tensor,
        margin: Tensor, blocks: Tensor, is_renormalised: bool,
    ) -> None:  # fmt: skip
        real = torch.ones(len(logits), 1) if token_id is None else (token_id >= 0).float().unsqueeze(1)
        top_k, experts = index.shape[1], logits.shape[1]
        probability.copy_(logits.softmax(dim=1))
        log_sum.copy_(logits.logsumexp(dim=1) + 0 * probability.sum(dim=1))  # NaN for infinite logits, as the kernel's
        best = probability.nan_to_num(0.0).sort(dim=1, descending=True, stable=True)
        index.copy_(best.indices[:, :top_k])
        chosen = probability.gather(1, index)
        weight.copy_(chosen / chosen.sum(dim=1, keepdim=True) if is_renormalised else chosen)
        last = best.values[:, top_k - 1]
        margin.copy_(last - best.values[:, top_k] if top_k < experts else torch.zeros(len(logits)))
        count = torch.zeros_like(logits).scatter_(1, index, 1.0)
        entropy = torch.special.entr(probability).sum(dim=1)
        rest = torch.stack((log_sum.square(), entropy, margin, torch.ones_like(margin)), dim=1)
        # The sums of all tokens in the first row, in place of each block's in its own.
        blocks.zero_()
        blocks[:1] = (torch.cat((probability, count, rest), dim=1) * real).sum(dim=0)

    @staticmethod
    def choice_gradients(
        probability: Tensor, log_sum: Tensor, index: Tensor, weight: Tensor, token_id: Tensor | None,
        grad_weight: Tensor, grad_sum: Tensor, grad_z: Tensor, grad: Tensor, is_renormalised: bool,
    ) -> None:  # fmt: skip
        real = torch.ones(len(index), 1) if token_id is None else (token_id >= 0).float().unsqueeze(1)
        given = grad_sum * real
        grad.zero_()
        if is_renormalised:
            mean = (weight * grad_weight).sum(dim=1, keepdim=True)
            grad.scatter_(1, index, weight * (grad_weight - mean))
        else:
            given = given.scatter_add(1, index, grad_weight)
        inner = (probability * given).sum(dim=1, keepdim=True)
        grad += probability * (given - inner + 2 * log_sum.unsqueeze(1) * grad_z * real)

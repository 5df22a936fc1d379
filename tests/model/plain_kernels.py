"""What model.rotary_kernels and model.cross_entropy_kernels compute, in torch's operations: for CPUs."""

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

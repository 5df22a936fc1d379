"""Collectives with gradients, on a given group. In a group of one rank each returns its input.

    forward      backward
    all-gather   reduce-scatter     AllGather      every rank has all rows
    reduce-      all-gather         ReduceScatter  every rank has its rows of the sum
      scatter

Rows are dim 0, the same number on every rank, in the group's order of ranks.
"""

from typing import Any

import torch
from torch import Tensor, distributed


def gather_rows(x: Tensor, group: distributed.ProcessGroup) -> Tensor:
    """The x [N, ...] of all ranks, concatenated along dim 0: [ranks * N, ...]; no gradient. Collective."""
    if group.size() == 1:
        return x
    whole = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
    distributed.all_gather_into_tensor(whole, x.contiguous(), group=group)
    return whole


def scatter_sum(x: Tensor, group: distributed.ProcessGroup) -> Tensor:
    """This rank's rows of the sum over ranks of x [ranks * N, ...]: [N, ...]; no gradient. Collective."""
    if group.size() == 1:
        return x
    part = x.new_empty(x.shape[0] // group.size(), *x.shape[1:])
    distributed.reduce_scatter_tensor(part, x.contiguous(), group=group)
    return part


class AllGather(torch.autograd.Function):
    """gather_rows with a gradient: the gradient of a row is the sum of that row's gradients on all ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: distributed.ProcessGroup) -> Tensor:
        ctx.group = group
        return gather_rows(x, group)

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor, None]:
        return scatter_sum(gradient[0], ctx.group), None


class ReduceScatter(torch.autograd.Function):
    """scatter_sum with a gradient: every rank's summand has the gradient of the sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: distributed.ProcessGroup) -> Tensor:
        ctx.group = group
        return scatter_sum(x, group)

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor, None]:
        return gather_rows(gradient[0], ctx.group), None

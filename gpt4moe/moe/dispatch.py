"""Tokens -> expert ranks -> tokens.

    x [T, H] -> gather over etp -> sort by expert [A, H] -> all-to-all over ep [N, H] -> sort by local expert [P, H]
      [T, H] <- reduce-scatter  <-  sum over K, unsort   <-  all-to-all back          <-  unsort  <- experts <-

T tokens of this rank, K experts a token goes to, A <= etp * T * K assignments kept, N rows that arrive here, L local
experts, P >= N places at the experts: grouped kernels want each expert's rows to begin at a multiple of ALIGNED, so
some places are padding. Expert tensor parallel: the ranks of etp hold other tokens (of tp, cp or dp), which each has
routed already, and each a part of every local expert's ffn, so each computes a part of all their outputs. Groups of one
do nothing.

A row's weight travels with it, as bits behind its values: one message each way. Every step is a gather, forward and
backward, so that nothing is summed in an order that changes from run to run. Which row goes where: plan.py.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from deepspeed.moe.ep_count import count_tokens_per_expert
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from gpt4moe.moe.expert_rows import ALIGNED, ExpertRows, HostCopy
from gpt4moe.moe.plan import Plan, Splits, inverse
from gpt4moe.parallel.collectives import AllGather, ReduceScatter, gather_rows

WEIGHT_BYTES = 4


@dataclass(frozen=True, slots=True)
class Arrived:
    """Rows on the rank of their experts."""

    rows: Tensor
    """[P, H], sorted by local expert."""
    weight: Tensor
    """[P, 1] fp32, 0 for padding."""
    of_experts: ExpertRows
    """Places of each local expert, padding included."""


class Dispatcher:
    """Moves rows over one expert-parallel group, after gathering them over the expert-tensor-parallel one.

    Args:
        etp: all of its ranks have the same number of tokens.
        want_aligned: whether rows are to be aligned as grouped kernels want them, if a rank gets so many.
    """

    def __init__(self, ep: ProcessGroup, etp: ProcessGroup, num_experts: int, want_aligned: Callable[[int], bool]):
        self.ep = ep
        self.etp = etp
        self.ep_size = ep.size()
        self.num_experts = num_experts
        self.num_local = num_experts // self.ep_size
        self.want_aligned = want_aligned

    def plan(self, expert_index_TK: Tensor, keep_TK: Tensor | None, load_E: Tensor | None = None) -> Plan:
        """Collective over etp and ep, also for a rank without tokens.

        Args:
            keep_TK: bool, False for dropped assignments; None keeps all.
            load_E: int32, assignments of this rank to each expert, if the caller has counted them.
        """
        index = gather_rows(expert_index_TK, self.etp)
        keep = None if keep_TK is None else gather_rows(keep_TK, self.etp)
        expert = index.flatten()
        if keep is not None:  # what is dropped goes behind the last expert
            expert = expert.masked_fill(~keep.flatten(), self.num_experts)
        if load_E is None or keep is not None or self.etp.size() > 1:
            load_E = count_tokens_per_expert(expert, self.num_experts + 1)[:-1]
        arriving, on_host = self._exchanged(load_E)
        order = torch.argsort(expert, stable=True)
        return Plan(
            num_tokens=index.shape[0],
            top_k=index.shape[1],
            order=order,
            home=inverse(order, len(order)) if keep is None else None,
            arriving=arriving,
            on_host=on_host,
            aligned=ALIGNED if self.want_aligned(len(order)) else 1,  # other ranks send as many, on average
        )

    def _exchanged(self, sent_E: Tensor) -> tuple[Tensor, HostCopy]:
        """Plan's arriving and on_host, of the rows that this rank sends to each expert."""
        sent = sent_E.view(self.ep_size, self.num_local)
        if self.ep_size == 1:
            return sent, HostCopy(sent)
        both = torch.stack((sent, sent))
        distributed.all_to_all_single(both[1], sent, group=self.ep)
        return both[1], HostCopy(both)

    def send(self, x_TH: Tensor, weight_TK: Tensor, plan: Plan) -> Arrived:
        """Rows and weights to the ranks of their experts. Collective over etp and ep."""
        if self.etp.size() > 1:
            x_TH, weight_TK = AllGather.apply(x_TH, self.etp), AllGather.apply(weight_TK, self.etp)
        rows, weight = ToExperts.apply(x_TH, weight_TK, plan, self.ep)
        return Arrived(rows, weight, plan.place().of_experts)

    def combine(self, y_PH: Tensor, plan: Plan) -> Tensor:
        """Expert outputs back on the tokens' ranks, summed over each token's experts: [T, H]. Collective as send is."""
        y_TH = FromExperts.apply(y_PH, plan, self.ep)
        return ReduceScatter.apply(y_TH, self.etp) if self.etp.size() > 1 else y_TH


class ToExperts(torch.autograd.Function):
    """x [T, H], weight [T, K] fp32 -> [P, H], [P, 1] fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, plan: Plan, ep: ProcessGroup) -> tuple[Tensor, Tensor]:
        rows, weights = to_experts(x, weight, plan, ep)
        assert weights is not None
        keep_indices(ctx, plan, ep)
        return rows, weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        rows, weight = (
            gradient if needed else None for gradient, needed in zip(gradients, ctx.needs_input_grad, strict=False)
        )
        return *to_tokens(rows, weight, *kept_indices(ctx)), None, None


class FromExperts(torch.autograd.Function):
    """y [P, H] -> sums over each token's experts, [T, H]."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, plan: Plan, ep: ProcessGroup) -> Tensor:
        keep_indices(ctx, plan, ep)
        output = to_tokens(y, None, plan, ep)[0]
        assert output is not None
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor, None, None]:
        return to_experts(gradient[0], None, *kept_indices(ctx))[0], None, None


def keep_indices(ctx: Any, plan: Plan, ep: ProcessGroup) -> None:
    placed = plan.place()
    ctx.save_for_backward(plan.assignment, plan.home, placed.place, placed.row)
    ctx.plan = replace(plan, order=None, home=None, placed=replace(placed, place=None, row=None))
    ctx.ep = ep


def kept_indices(ctx: Any) -> tuple[Plan, ProcessGroup]:
    assignment, home, place, row = ctx.saved_tensors
    placed = replace(ctx.plan.placed, place=place, row=row)
    return replace(ctx.plan, order=assignment, home=home, placed=placed), ctx.ep


def to_experts(x: Tensor, weight: Tensor | None, plan: Plan, ep: ProcessGroup) -> tuple[Tensor, Tensor | None]:
    """Rows of tokens [T, H] at their experts [P, H], and of weights [T, K] those of the rows [P, 1], if any."""
    assignment = plan.assignment
    token = assignment // plan.top_k if plan.top_k > 1 else assignment
    weights = None if weight is None else weight.flatten().index_select(0, assignment).unsqueeze(1)
    if ep.size() > 1:
        x, weights = exchange(x, token, weights, lambda: plan.splits, ep)
        token = None
    placed = plan.place()
    rows = picked(x, token if placed.row is None else placed.row if token is None else picked(token, placed.row))
    if weights is not None and placed.place is not None and placed.row is not None:
        weights = weights.new_zeros(len(placed.row), 1).index_copy_(0, placed.place, weights)
    return rows.contiguous(), weights


def to_tokens(
    y: Tensor | None, weight: Tensor | None, plan: Plan, ep: ProcessGroup
) -> tuple[Tensor | None, Tensor | None]:
    """The way back: sums over K of rows [P, H], [T, H]; and numbers of rows [P, 1] at their assignments, [T, K]."""
    index = plan.place().place
    if ep.size() > 1:
        weight = None if weight is None else picked(weight, index)
        y, weight = exchange(y, index, weight, lambda: (plan.splits[1], plan.splits[0]), ep)
        index = None
    if plan.home is not None:
        index = plan.home if index is None else picked(index, plan.home)
    output, weights = (None if value is None else at_assignments(value, index, plan) for value in (y, weight))
    return None if output is None else output.sum(dim=1), None if weights is None else weights.squeeze(-1)


def at_assignments(value: Tensor, index: Tensor | None, plan: Plan) -> Tensor:
    """The row of each assignment, [T, K, width]; zeros for one that was dropped."""
    rows, shape = picked(value, index), (plan.num_tokens, plan.top_k, value.shape[1])
    if plan.home is not None:
        return rows.view(shape)
    spread = rows.new_zeros(plan.num_tokens * plan.top_k, rows.shape[1])
    spread[plan.assignment] = rows
    return spread.view(shape)


def picked(value: Tensor, index: Tensor | None) -> Tensor:
    """value[index]; zeros where there is nothing to pick from."""
    if index is None:
        return value
    return value.index_select(0, index) if len(value) else value.new_zeros(len(index), *value.shape[1:])


def exchange(
    value: Tensor | None, index: Tensor | None, weight: Tensor | None, splits: Callable[[], Splits], ep: ProcessGroup
) -> tuple[Any, Tensor | None]:
    """All-to-all of rows value[index] [A, H], each with its weight [A, 1] fp32 behind it; either may be None.

    Args:
        index: None: all of them, in order.
        splits: called when the message is made; it may wait.
    Returns: both of the rows that came: [N, H], a view of the message, and [N, 1].
    """
    given = weight if value is None else value
    assert given is not None
    width, behind = 0 if value is None else value.shape[1], 0 if weight is None else WEIGHT_BYTES // given.itemsize
    assert weight is None or behind * given.itemsize == weight.itemsize == WEIGHT_BYTES, "fp32 behind fp32 or less"
    if weight is None and index is None:
        message = given.contiguous()
    else:
        message = given.new_empty(len(given if index is None else index), width + behind)
        if index is None and value is not None:
            message[:, :width] = value
        elif value is not None:
            torch.index_select(value, 0, index, out=message[:, :width])
        if weight is not None:
            message[:, width:] = weight.contiguous().view(given.dtype)
    sent, received = splits()
    came = given.new_empty(sum(received), width + behind)
    distributed.all_to_all_single(came, message, received, sent, group=ep)
    weights = None
    if weight is not None:
        # A copy, also of 0 or 1 rows, which are contiguous where they stand: but not where 4 bytes may begin.
        weights = came[:, width:].clone(memory_format=torch.contiguous_format).view(weight.dtype)
    return None if value is None else came[:, :width], weights

"""Tokens -> expert ranks -> tokens.

    x [T, H] -> gather over etp -> sort by expert [A, H] -> all-to-all over ep [N, H] -> sort by local expert [P, H]
      [T, H] <- reduce-scatter  <-  sum over K, unsort   <-  all-to-all back          <-  unsort  <- experts <-

T tokens of this rank, K experts a token goes to, A <= etp * T * K assignments kept, N rows that arrive here, L local
experts, P >= N places at the experts: grouped kernels want each expert's rows to begin at a multiple of ALIGNED, so
some places are padding. Expert tensor parallel: the ranks of etp hold other tokens (of tp, cp or dp), which each has
routed already, and each a part of every local expert's ffn, so each computes a part of all their outputs. Groups of one
do nothing.

A row's weight travels with it, as bits behind its values: one message each way. Every step is a gather, forward and
backward, so that nothing is summed in an order that changes from run to run. DeepSpeed's: the split plan.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from deepspeed.module_inject.auto_ep_layer import compute_split_plan
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from gpt4moe.parallel.collectives import AllGather, ReduceScatter, gather_rows

ALIGNED = 8
"""Rows: 16 bytes of bf16, by which torch's grouped product wants every expert to begin."""
WEIGHT_BYTES = 4


@dataclass(frozen=True, slots=True)
class Plan:
    """Which token goes to which expert's rank, in one micro-batch of one layer: indices and counts, no activations."""

    num_tokens: int
    """T x etp."""
    top_k: int
    assignment: Tensor
    """[A], index into the etp * T * K assignments of each row sent, sorted by expert."""
    home: Tensor | None
    """[etp * T * K], the row sent of each assignment; None where some are dropped."""
    splits: tuple[list[int], list[int]]
    """Number of rows sent to each rank of ep, and received from each."""
    place: Tensor | None
    """[N], where each row that arrived stands at the experts; None: as they arrived."""
    row: Tensor | None
    """[P], the row at each place; some row at a place of padding, whose weight is 0."""
    counts: Tensor
    """[L], places of each local expert."""

    @property
    def indices(self) -> tuple[Tensor | None, ...]:
        """What a backward pass needs."""
        return self.assignment, self.home, self.place, self.row


@dataclass(frozen=True, slots=True)
class Arrived:
    """Rows on the rank of their experts."""

    rows: Tensor
    """[P, H], sorted by local expert."""
    weight: Tensor
    """[P, 1] fp32, 0 for padding."""
    counts: Tensor
    """[L], places of each local expert, padding included."""


class Dispatcher:
    """Moves rows over one expert-parallel group, after gathering them over the expert-tensor-parallel one.

    Args:
        etp: all of its ranks have the same number of tokens.
        padded: groups of rows aligned as grouped kernels want them.
    """

    def __init__(self, ep: ProcessGroup, etp: ProcessGroup, num_experts: int, *, padded: bool):
        self.ep = ep
        self.etp = etp
        self.ep_size = ep.size()
        self.num_experts = num_experts
        self.num_local = num_experts // self.ep_size
        self.padded = padded

    def plan(self, expert_index_TK: Tensor, keep_TK: Tensor | None) -> Plan:
        """Collective over etp and ep, also for a rank without tokens.

        Args:
            keep_TK: bool, False for dropped assignments; None keeps all.
        """
        index = gather_rows(expert_index_TK, self.etp)
        keep = None if keep_TK is None else gather_rows(keep_TK, self.etp)
        expert = index.flatten()
        kept = None if keep is None else keep.flatten().nonzero().squeeze(1)
        chosen = expert if kept is None else expert[kept]
        order = torch.argsort(chosen, stable=True)
        split = compute_split_plan(chosen, self.num_experts, self.ep_size, self.num_local, self.ep)
        place, row, counts = None, None, split.local_counts_by_source[0]
        if self.padded or self.ep_size > 1:
            place, row, counts = places(
                split.local_counts_by_source, sum(split.output_splits), ALIGNED if self.padded else 1
            )
        return Plan(
            num_tokens=index.shape[0],
            top_k=index.shape[1],
            assignment=order if kept is None else kept[order],
            home=inverse(order, len(order)) if kept is None else None,
            splits=(split.input_splits, split.output_splits),
            place=place,
            row=row,
            counts=counts,
        )

    def send(self, x_TH: Tensor, weight_TK: Tensor, plan: Plan) -> Arrived:
        """Rows and weights to the ranks of their experts. Collective over etp and ep."""
        if self.etp.size() > 1:
            x_TH, weight_TK = AllGather.apply(x_TH, self.etp), AllGather.apply(weight_TK, self.etp)
        rows, weight = ToExperts.apply(x_TH, weight_TK, plan, self.ep)
        return Arrived(rows, weight, plan.counts)

    def combine(self, y_PH: Tensor, plan: Plan) -> Tensor:
        """Expert outputs back on the tokens' ranks, summed over each token's experts: [T, H]. Collective as send is."""
        y_TH = FromExperts.apply(y_PH, plan, self.ep)
        return ReduceScatter.apply(y_TH, self.etp) if self.etp.size() > 1 else y_TH


def places(counts_by_source: Tensor, num_rows: int, aligned: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows arrive by source rank, then local expert; they stand by expert, sources in order inside.

    Args:
        counts_by_source: [ep, L], rows that arrive here.
        num_rows: their sum N.
        aligned: a power of two. Each expert has a multiple of it, and no fewer; 1: as many places as rows.
    Returns: Plan's place [N], row [P] and counts [L].
    """
    counts, num_places = counts_by_source.sum(dim=0), num_rows
    sizes = counts
    if aligned > 1:
        sizes = (counts.clamp_min(1) + (aligned - 1)) & -aligned
        num_places = -(-num_rows // aligned) * aligned + len(counts) * aligned
    flat = counts_by_source.flatten()
    begin = torch.cumsum(sizes, 0) - sizes
    if len(counts_by_source) > 1:  # behind the rows of the sources before
        begin = begin + torch.cumsum(counts_by_source, 0) - counts_by_source
    shift = begin.flatten() - (torch.cumsum(flat, 0) - flat)
    place = torch.repeat_interleave(shift, flat, output_size=num_rows)
    place += torch.arange(num_rows, device=flat.device)
    return place, inverse(place, num_places), sizes


def inverse(order: Tensor, size: int) -> Tensor:
    """[size] int64: where each number stands in `order`, whose numbers all differ; 0 for a number that is not there."""
    found = order.new_empty(size) if size == len(order) else order.new_zeros(size)
    found[order] = torch.arange(len(order), device=order.device)
    return found


class ToExperts(torch.autograd.Function):
    """x [T, H], weight [T, K] fp32 -> [P, H], [P, 1] fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, plan: Plan, ep: ProcessGroup) -> tuple[Tensor, Tensor]:
        keep_indices(ctx, plan, ep)
        rows, weights = to_experts(x, weight, plan, ep)
        assert weights is not None
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
    ctx.save_for_backward(*plan.indices)
    ctx.plan, ctx.ep = replace(plan, assignment=None, home=None, place=None, row=None), ep  # type: ignore[arg-type]


def kept_indices(ctx: Any) -> tuple[Plan, ProcessGroup]:
    assignment, home, place, row = ctx.saved_tensors
    return replace(ctx.plan, assignment=assignment, home=home, place=place, row=row), ctx.ep


def to_experts(x: Tensor, weight: Tensor | None, plan: Plan, ep: ProcessGroup) -> tuple[Tensor, Tensor | None]:
    """Rows of tokens [T, H] at their experts [P, H], and of weights [T, K] those of the rows [P, 1], if any."""
    token = plan.assignment // plan.top_k if plan.top_k > 1 else plan.assignment
    weights = None if weight is None else weight.flatten().index_select(0, plan.assignment).unsqueeze(1)
    if ep.size() > 1:
        x, weights = exchange(x, token, weights, plan.splits, ep)
        token = None
    rows = picked(x, token if plan.row is None else plan.row if token is None else picked(token, plan.row))
    if weights is not None and plan.place is not None and plan.row is not None:
        weights = weights.new_zeros(len(plan.row), 1).index_copy_(0, plan.place, weights)
    return rows, weights


def to_tokens(
    y: Tensor | None, weight: Tensor | None, plan: Plan, ep: ProcessGroup
) -> tuple[Tensor | None, Tensor | None]:
    """The way back: sums over K of rows [P, H], [T, H]; and numbers of rows [P, 1] at their assignments, [T, K]."""
    index = plan.place
    if ep.size() > 1:
        weight = None if weight is None else picked(weight, index)
        y, weight = exchange(y, index, weight, (plan.splits[1], plan.splits[0]), ep)
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
    value: Tensor | None, index: Tensor | None, weight: Tensor | None, splits: tuple[list[int], list[int]],
    ep: ProcessGroup,
) -> tuple[Any, Tensor | None]:  # fmt: skip
    """All-to-all of rows value[index] [A, H], each with its weight [A, 1] fp32 behind it; either may be None.

    Returns: both of the rows that came: [N, H], a view of the message, and [N, 1].
    """
    given = weight if value is None else value
    assert given is not None
    width, behind = 0 if value is None else value.shape[1], 0 if weight is None else WEIGHT_BYTES // given.itemsize
    assert weight is None or behind * given.itemsize == weight.itemsize == WEIGHT_BYTES, "fp32 behind fp32 or less"
    message = given.new_empty(sum(splits[0]), width + behind)
    if value is not None:
        torch.index_select(value, 0, index, out=message[:, :width])
    if weight is not None:
        message[:, width:] = weight.contiguous().view(given.dtype)
    came = given.new_empty(sum(splits[1]), width + behind)
    distributed.all_to_all_single(came, message, splits[1], splits[0], group=ep)
    weights = None
    if weight is not None:
        # A copy, also of 0 or 1 rows, which are contiguous where they stand: but not where 4 bytes may begin.
        weights = came[:, width:].clone(memory_format=torch.contiguous_format).view(weight.dtype)
    return None if value is None else came[:, :width], weights

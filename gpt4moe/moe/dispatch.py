"""Tokens -> expert ranks -> tokens.

    x [T, H] -> gather over etp -> sort by expert [A, H] -> all-to-all over ep -> sort by local expert [N, H] -> experts
      [T, H] <- reduce-scatter  <-  sum over K, unsort   <-  all-to-all back   <-  unsort                    <-

T tokens of this rank, K experts a token goes to, A <= etp * T * K assignments kept, N rows that arrive here, L local
experts. Expert tensor parallel: the ranks of etp hold other tokens (of tp, cp or dp), which each has routed already,
and each a part of every local expert's ffn, so each computes a part of all their outputs. Groups of one do nothing.

DeepSpeed's: the split plan, the all-to-all, the padded permutation that grouped kernels need, the combine. Ours: the
plain permutation (on CPU and without grouped kernels padding would only cost), and gathers whose backward pass is a
gather too, so that nothing is summed in an order that changes from run to run.
"""

from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.module_inject.auto_ep_layer import (
    _AllToAllV,
    combine_from_routed,
    compute_split_plan,
    permute_by_local_expert,
    unpermute_by_local_expert,
)
from torch import Tensor, distributed

from gpt4moe.parallel.collectives import AllGather, ReduceScatter, gather_rows


@dataclass(frozen=True, slots=True)
class Plan:
    """Which token goes to which expert's rank, in one micro-batch of one layer: indices and counts, no activations."""

    num_tokens: int
    """T x etp."""
    top_k: int
    assignment: Tensor
    """[A], index into the etp * T * K assignments of each row sent, sorted by expert."""
    counts_by_source: Tensor
    """[ep, L], number of rows that arrive here, by source rank and local expert."""
    splits: tuple[list[int], list[int]]
    """Number of rows sent to each rank of ep, and received from each."""
    order: Tensor | None
    """[2, N]: the permutation that sorts arrived rows by local expert, and its inverse. None where they are sorted
    already, or where DeepSpeed's padded permutation sorts them."""


@dataclass(frozen=True, slots=True)
class Arrived:
    """Rows on the rank of their experts."""

    rows: Tensor
    """[N, H], sorted by local expert (N padded where the kernel needs it)."""
    weight: Tensor
    """[N, 1] fp32."""
    counts: Tensor
    """[L], rows of each local expert."""
    padding: Tensor | None
    """DeepSpeed's indices to undo its padded permutation."""


class Dispatcher:
    """Moves rows over one expert-parallel group, after gathering them over the expert-tensor-parallel one.

    Args:
        etp: all of its ranks have the same number of tokens.
        padded: groups of rows aligned as grouped kernels on GPUs want them (DeepSpeed's permutation).
    """

    def __init__(self, ep: distributed.ProcessGroup, etp: distributed.ProcessGroup, num_experts: int, *, padded: bool):
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
        return Plan(
            num_tokens=index.shape[0],
            top_k=index.shape[1],
            assignment=order if kept is None else kept[order],
            counts_by_source=split.local_counts_by_source,
            splits=(split.input_splits, split.output_splits),
            order=None if self.ep_size == 1 or self.padded else _by_local_expert(split.local_counts_by_source),
        )

    def send(self, x_TH: Tensor, weight_TK: Tensor, plan: Plan) -> Arrived:
        """Rows and weights to the ranks of their experts. Collective over etp and ep."""
        if self.etp.size() > 1:
            x_TH, weight_TK = AllGather.apply(x_TH, self.etp), AllGather.apply(weight_TK, self.etp)
        rows = GatherTokens.apply(x_TH, plan.assignment, plan.top_k)
        weight = GatherTokens.apply(weight_TK.reshape(-1, 1), plan.assignment, 1)
        if self.ep_size > 1:
            rows = _AllToAllV.apply(self.ep, rows, *plan.splits)
            weight = _AllToAllV.apply(self.ep, weight, *plan.splits)
        if self.padded:
            rows, indices, counts, _ = permute_by_local_expert(rows, plan.counts_by_source)
            weight = torch.cat((weight, weight.new_zeros(1, 1)))[indices]
            return Arrived(rows, weight, counts, indices)
        if plan.order is not None:
            order, inverse = plan.order.unbind()
            rows, weight = PermuteRows.apply(rows, order, inverse), PermuteRows.apply(weight, order, inverse)
        return Arrived(rows, weight, plan.counts_by_source.sum(dim=0), None)

    def combine(self, y_NH: Tensor, arrived: Arrived, plan: Plan) -> Tensor:
        """Expert outputs back on the tokens' ranks, summed over each token's experts: [T, H]. Collective as send is."""
        if arrived.padding is not None:
            y_NH = unpermute_by_local_expert(y_NH, arrived.padding, sum(plan.splits[1]))
        elif plan.order is not None:
            order, inverse = plan.order.unbind()
            y_NH = PermuteRows.apply(y_NH, inverse, order)
        if self.ep_size > 1:
            y_NH = _AllToAllV.apply(self.ep, y_NH, plan.splits[1], plan.splits[0])
        shape = (1, plan.num_tokens, y_NH.shape[-1])
        # "pre": the router's weights are in the rows already; the second argument is then unused.
        y_TH = combine_from_routed(y_NH, arrived.weight, plan.assignment, plan.top_k, "pre", "weighted_sum", shape)[0]
        return ReduceScatter.apply(y_TH, self.etp) if self.etp.size() > 1 else y_TH


def _by_local_expert(counts_by_source: Tensor) -> Tensor:
    """Rows arrive by source rank, then local expert: their order by expert, sources in order inside, and its inverse.

    Returns: [2, N] int64.
    """
    sources, num_local = counts_by_source.shape
    local = torch.arange(num_local, device=counts_by_source.device).repeat(sources)
    order = torch.argsort(torch.repeat_interleave(local, counts_by_source.flatten()), stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    return torch.stack((order, inverse))


class GatherTokens(torch.autograd.Function):
    """Row a of the output is token assignment[a] // K. Backward: scatter to [T, K, H] and sum over K, in order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, assignment: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(assignment)
        ctx.shape = (x.shape[0], top_k, x.shape[1])
        return x.index_select(0, assignment // top_k if top_k > 1 else assignment)

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor, None, None]:
        (assignment,) = ctx.saved_tensors
        num_tokens, top_k, width = ctx.shape
        spread = gradient[0].new_zeros(num_tokens * top_k, width)
        spread[assignment] = gradient[0]
        return spread.view(ctx.shape).sum(dim=1), None, None


class PermuteRows(torch.autograd.Function):
    """x[order]; the backward pass gathers through the inverse permutation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return gradient[0].index_select(0, inverse), None, None

"""What is decided over a whole micro-batch, whose tokens are spread over tp x cp: sums, sequence order, capacity.

Because sums, losses and drops are defined over this pool of tokens, no layout changes them. Sums need no order;
capacity does, for an over-full expert keeps the earlier tokens.

    gathered [ranks, S/tp/cp, B] --gather_in_order--> [S, B] in sequence order --own--> [S/tp/cp, B] of this rank

Shapes: T tokens of this rank = (S / tp / cp) x B in the order [S, B]; P tokens of the pool = T x ranks; K experts a
token goes to; E experts.
"""

from collections.abc import Sequence
from math import ceil
from typing import Any

import torch
from deepspeed.moe.ep_count import count_tokens_per_expert
from torch import Tensor, distributed

from gpt4moe.config.moe import DropPolicy
from gpt4moe.parallel.collectives import gather_rows
from gpt4moe.parallel.groups import ProcessGroups
from gpt4moe.parallel.placement import sequence_chunks


class TokenPool:
    """Sums and gathers over one micro-batch. All ranks of tp x cp make the same calls, whatever tokens they have."""

    def __init__(self, groups: ProcessGroups):
        self.group: distributed.ProcessGroup = groups.tp_cp
        self.size = groups.tp_cp.size()
        self.tp, self.cp = groups.layout.tp, groups.layout.cp

    def sum(self, *values: Tensor) -> tuple[Tensor, ...]:
        """Each of them summed over the ranks, in one all-reduce; the gradients pass through unchanged (PoolSum).

        Args:
            values: of one dtype.
        """
        return PoolSum.apply(self.group, *values)

    def gather_in_order(self, rows: Tensor, batch: int) -> Tensor:
        """Rows [T, ...] of all ranks, [P, ...], in the order [S, B]. No gradient."""
        gathered = gather_rows(rows, self.group)
        if self.cp == 1:
            return gathered
        by_position = gathered.view(-1, batch, *rows.shape[1:])
        return by_position[self._places(rows.shape[0] // batch, rows.device).argsort()].view_as(gathered)

    def own(self, rows: Tensor, batch: int) -> Tensor:
        """This rank's [T, ...] of rows [P, ...] that gather_in_order has ordered."""
        if self.cp == 1:
            return rows.chunk(self.size)[self.group.rank()]
        local = rows.shape[0] // self.size // batch
        places = self._places(local, rows.device).chunk(self.size)[self.group.rank()]
        return rows.view(-1, batch, *rows.shape[1:])[places].flatten(0, 1)

    def _places(self, local: int, device: torch.device) -> Tensor:
        return torch.tensor(gathered_positions(local, self.tp, self.cp), device=device)


class PoolSum(torch.autograd.Function):
    """All-reduce forward, identity backward.

    Every rank then has the same sum, and adds the gradient of its own tokens only. The router's weight gradient is
    summed over tp afterwards, like that of every sequence-parallel weight, and is then the whole one.
    """

    @staticmethod
    def forward(ctx: Any, pool: distributed.ProcessGroup, *values: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        parts: Sequence[Tensor] = values
        if pool.size() > 1:
            total = torch.cat([value.flatten() for value in values])
            distributed.all_reduce(total, group=pool)
            parts = total.split([value.numel() for value in values])
        sums = tuple(part.view_as(value) for part, value in zip(parts, values, strict=True))
        needed = ctx.needs_input_grad[1:]
        ctx.mark_non_differentiable(*(it for it, is_needed in zip(sums, needed, strict=True) if not is_needed))
        return sums

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *gradients


def gathered_positions(local: int, tp: int, cp: int) -> list[int]:
    """Position in its sequence of each row of a gathered pool, ranks in the order of tp_cp (tp fastest).

    A context-parallel rank has the chunks of placement.sequence_chunks; sequence parallelism cuts those over tp.

    Args:
        local: sequence positions of one rank, S / tp / cp.
    """
    size = local * tp // len(sequence_chunks(cp, 0))
    chunks = [chunk for cp_index in range(cp) for chunk in sequence_chunks(cp, cp_index)]
    return [position for chunk in chunks for position in range(chunk * size, (chunk + 1) * size)]


def capacity(num_tokens: int, num_experts: int, top_k: int, factor: float) -> int:
    """Slots of one expert for a pool of tokens: ceil(factor * tokens * top_k / experts) (arXiv:2101.03961, eq. 3)."""
    return ceil(factor * num_tokens * top_k / num_experts)


def kept_assignments(
    expert_index: Tensor, probability: Tensor, slots: int | Tensor, policy: DropPolicy, num_experts: int
) -> Tensor:
    """Which assignments of a whole pool get a slot; the others are dropped.

    Args:
        expert_index: [P, K] int64, tokens in sequence order; E: no expert (padding), never kept.
        probability: [P, K], of the chosen expert; decides under DropPolicy.probability, ties go to the earlier token.
        slots: of one expert.
    Returns: [P, K] bool.
    """
    expert = expert_index.flatten()
    order = torch.arange(expert.numel(), device=expert.device)
    if policy is DropPolicy.probability:
        order = torch.argsort(probability.flatten(), descending=True, stable=True)
    by_expert = order[torch.argsort(expert[order], stable=True)]  # grouped by expert, best first inside
    counts = count_tokens_per_expert(expert, num_experts + 1)
    starts = torch.cumsum(counts, 0) - counts
    place = torch.arange(expert.numel(), device=expert.device) - starts[expert[by_expert]]
    keep = torch.empty_like(expert, dtype=torch.bool)
    keep[by_expert] = place < slots
    return keep.view_as(expert_index) & (expert_index < num_experts)


def kept_of_rank(
    expert_index: Tensor, probability: Tensor, *, num_experts: int, factor: float, policy: DropPolicy,
    pool: TokenPool, batch: int,
) -> Tensor:  # fmt: skip
    """kept_assignments of the whole micro-batch, this rank's part: [T, K] bool. Collective over the pool.

    Padding takes no slot, and the number of slots does not count it.

    Args:
        expert_index: [T, K], E where a token is padding; T = S / tp / cp x batch.
    """
    index = pool.gather_in_order(expert_index, batch)
    chance = pool.gather_in_order(probability.detach(), batch)
    # On the device, in fp64 as `capacity` counts: how many tokens are no padding is only known there.
    num_tokens = (index[:, 0] < num_experts).sum(dtype=torch.float64)
    slots = torch.ceil(factor * num_tokens * index.shape[1] / num_experts)
    return pool.own(kept_assignments(index, chance, slots, policy, num_experts), batch)

"""The pool: the tokens of one micro-batch, spread over tp x cp, and their order.

What a router pools (shares, losses, capacity) is defined over the pool, so that no layout changes it. Sums need no
order; who came first does. Shapes: T tokens of this rank = (S / tp / cp) x B in the order [S, B]; P = T x ranks.

    gathered [ranks, S/tp/cp, B] --in_order--> [S, B] in sequence order --own--> [S/tp/cp, B] of this rank
"""

import torch
from torch import Tensor, distributed

from gpt4moe.moe.losses import PoolSum
from gpt4moe.parallel.collectives import gather_rows
from gpt4moe.parallel.groups import ProcessGroups
from gpt4moe.parallel.placement import sequence_chunks


def gathered_positions(local: int, tp: int, cp: int) -> list[int]:
    """Where in its sequence each row of a gathered pool stands, ranks in the order of tp_cp (tp fastest).

    A context-parallel rank holds the chunks of placement.sequence_chunks; sequence parallelism cuts those over tp.

    Args:
        local: sequence positions of one rank, S / tp / cp.
    """
    size = local * tp // len(sequence_chunks(cp, 0))
    chunks = [chunk for cp_index in range(cp) for chunk in sequence_chunks(cp, cp_index)]
    return [position for chunk in chunks for position in range(chunk * size, (chunk + 1) * size)]


class Pool:
    """Sums and gathers over one micro-batch. Every rank of tp x cp calls the same, whatever tokens it has."""

    def __init__(self, groups: ProcessGroups):
        self.group: distributed.ProcessGroup = groups.tp_cp
        self.size = groups.tp_cp.size()
        self.tp, self.cp = groups.layout.tp, groups.layout.cp

    def sum(self, value: Tensor) -> Tensor:
        """All-reduced; the gradient passes through unchanged (losses.PoolSum)."""
        return PoolSum.apply(value, self.group)

    def gather_in_order(self, rows: Tensor, batch: int) -> Tensor:
        """Rows [T, ...] of all ranks, [P, ...], in the order [S, B]. No gradient."""
        gathered = gather_rows(rows, self.group)
        if self.cp == 1:
            return gathered
        by_position = gathered.view(-1, batch, *rows.shape[1:])
        return by_position[self._places(rows.shape[0] // batch, rows.device).argsort()].view_as(gathered)

    def own(self, rows: Tensor, batch: int) -> Tensor:
        """This rank's [T, ...] of what gather_in_order ordered, [P, ...]."""
        if self.cp == 1:
            return rows.chunk(self.size)[self.group.rank()]
        local = rows.shape[0] // self.size // batch
        places = self._places(local, rows.device).chunk(self.size)[self.group.rank()]
        return rows.view(-1, batch, *rows.shape[1:])[places].flatten(0, 1)

    def _places(self, local: int, device: torch.device) -> Tensor:
        return torch.tensor(gathered_positions(local, self.tp, self.cp), device=device)

"""Plan: which token goes to which expert's rank, and where its row stands there.

    experts of T tokens -> assignments sorted by expert; rows for each expert -> exchanged over ep -> HostCopy
    ... the host queues other work ... -> splits (awaited) -> rows are sent -> their places

The host has to know how many rows come before it can receive them. It waits where the rows are sent, and the GPU has
work meanwhile. Letters: dispatch.py.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gpt4moe.moe.expert_rows import ExpertRows, HostCopy, aligned_size

Splits = tuple[list[int], list[int]]
"""Number of rows sent to each rank of ep, and received from each."""


@dataclass(frozen=True, slots=True)
class Placed:
    """Where the rows that arrived stand at the experts."""

    place: Tensor | None
    """[N], the place of each; None: as they arrived."""
    row: Tensor | None
    """[P], the row at each place; some row at a place of padding, whose weight is 0."""
    of_experts: ExpertRows
    """Places of each local expert, padding included."""


@dataclass(slots=True)
class Plan:
    """Which token goes to which expert's rank, in one micro-batch of one layer: indices and counts, no activations."""

    num_tokens: int
    """T x etp."""
    top_k: int
    order: Any
    """[etp * T * K], assignments sorted by expert, the dropped ones last."""
    home: Tensor | None
    """[etp * T * K], the row sent of each assignment; None where some are dropped."""
    arriving: Tensor
    """[ep, L] int32, rows that arrive from each rank for each local expert."""
    on_host: HostCopy
    """[2, ep, L], rows sent and rows that arrive; of a group of one rank [1, L]."""
    aligned: int
    """Each expert has a multiple of so many places, and no fewer; 1: as many as rows."""
    placed: Placed | None = None

    @property
    def assignment(self) -> Tensor:
        """[A], index into the assignments of each row sent. Waits for their number where some are dropped."""
        return self.order if self.home is not None else self.order[: sum(self.splits[0])]

    @property
    def splits(self) -> Splits:
        """Waits for the numbers, the first time."""
        if len(self.arriving) == 1:
            sent = len(self.order) if self.home is not None else sum(self.on_host.listed[0])
            return [sent], [sent]
        sent, arriving = self.on_host.listed
        return list(map(sum, sent)), list(map(sum, arriving))

    def place(self) -> Placed:
        """Where rows stand. Waits for the numbers, the first time."""
        if self.placed is None:
            self.placed = self._place()
        return self.placed

    def _place(self) -> Placed:
        # No method of this object is kept: a cycle would hold its tensors until Python next looks for cycles.
        arriving, aligned = self.arriving, self.aligned
        listed = partial(rows_of_experts, self.on_host, len(arriving), aligned)
        if aligned == 1 and 1 in arriving.shape:  # of one rank, or for one expert: they arrive in order
            return Placed(None, None, ExpertRows(partial(arriving.sum, dim=0), listed, False))
        place, row, counts = places(arriving, sum(self.splits[1]), aligned)
        return Placed(place, row, ExpertRows(counts, listed, aligned > 1))


def rows_of_experts(on_host: HostCopy, num_ranks: int, aligned: int) -> list[int]:
    """Places of each local expert. Waits for the numbers, the first time.

    Args:
        on_host, aligned: as Plan has them.
        num_ranks: of ep.
    """
    arriving = on_host.listed[1] if num_ranks > 1 else on_host.listed
    counts = [sum(of_expert) for of_expert in zip(*arriving, strict=True)]
    return counts if aligned == 1 else [aligned_size(count) for count in counts]


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

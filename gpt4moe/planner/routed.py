"""What a routing costs: rows, bytes and busiest ranks, from the rows that each rank sends to each expert.

    counts [ep, E] of one layer and micro-batch -> rows that cross, rows that each rank computes, how hot the hottest is

Expert e is on rank e // (E / ep) of its expert-parallel group (parallel.placement). Counts may be a sum over layers and
micro-batches.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from gpt4moe.planner.communication import RoutedRows, row_bytes

Counts = Sequence[Sequence[int]]
"""[ep, E]: rows that each rank of an expert-parallel group sends to each expert, its own experts included."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Heat:
    """Of one routing."""

    rows: int
    """That all ranks send together."""
    busiest_expert: float
    """Rows of the fullest expert over the mean; 0 where there are no rows."""
    busiest_rank: float
    """Rows of the fullest rank's experts over the mean."""


def heat(counts: Counts) -> Heat:
    experts, ranks = [sum(column) for column in zip(*counts, strict=True)], computed_rows(counts)
    total = sum(ranks)
    return Heat(
        rows=total,
        busiest_expert=max(experts) * len(experts) / total if total else 0.0,
        busiest_rank=max(ranks) * len(ranks) / total if total else 0.0,
    )


def computed_rows(counts: Counts) -> list[int]:
    """Rows that the experts of each rank compute: [ep]."""
    return [sum(sum(row[own]) for row in counts) for own in _own_experts(counts)]


def rows_of_ranks(counts: Counts) -> list[RoutedRows]:
    """Rows that each rank exchanges with others: [ep]."""
    found = []
    for row, own, computed in zip(counts, _own_experts(counts), computed_rows(counts), strict=True):
        stay = sum(row[own])
        found.append(RoutedRows(sent=sum(row) - stay, received=computed - stay))
    return found


def exchanged_bytes(counts: Counts, width_bytes: int, *, plans: int = 1) -> list[int]:
    """All bytes that each rank sends over its expert-parallel group, without recomputation: [ep].

    Rows (communication.row_bytes), each row's router weight with its gradient, and the numbers of rows that come.

    Args:
        width_bytes: of one row, hidden_size times the bytes of an element.
        plans: of how many layers and micro-batches the counts are the sum.
    """
    ep = len(counts)
    announced = plans * _COUNT_BYTES * len(counts[0]) * (ep - 1) // ep
    return [
        int(row_bytes(rows, width_bytes) + _WEIGHT_BYTES * (rows.sent + rows.received)) + announced
        for rows in rows_of_ranks(counts)
    ]


_WEIGHT_BYTES, _COUNT_BYTES = 4, 4


def _own_experts(counts: Counts) -> list[slice]:
    num_local = len(counts[0]) // len(counts)
    return [slice(rank * num_local, (rank + 1) * num_local) for rank in range(len(counts))]

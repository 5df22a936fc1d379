"""The pipeline schedule as data: what each rank computes, and in which order.

    schedule(pp, vpp, micro_batches) -> a list of slots for each rank -> simulate -> Timeline -> bubble_share
                                                                      -> peak_live: activations kept

Three orders, slot by slot as Megatron-core 0.16.1 runs them (pipeline_parallel/schedules.py; a test records the real
order). Without a pipeline: each forward pass, then its backward pass. With one: 1F1B (PipeDream-flush, arXiv:2104.04473
section 2.2.1), or interleaved 1F1B (section 2.2.2). Stage c * pp + r is chunk c of rank r.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from gpt4moe.errors import LayoutError


class Pass(str, Enum):
    """What a slot computes."""

    forward = "forward"
    backward = "backward"


@dataclass(frozen=True, slots=True)
class Slot:
    """One pass of one micro-batch through one chunk of a rank."""

    direction: Pass
    chunk: int
    """Index of the virtual stage on its rank, from 0."""
    micro_batch: int


Table = list[list[Slot]]
"""The slots of every pipeline rank, in the order they run."""


def schedule(*, pp: int, vpp: int = 1, micro_batches: int, group_size: int | None = None) -> Table:
    """The slots that each of the pp ranks of a pipeline runs in one step.

    Args:
        micro_batches: of one data-parallel rank.
        group_size: consecutive micro-batches of a chunk before the next chunk's turn, Megatron's
            microbatch_group_size_per_vp_stage. Default: pp. No effect when vpp is 1.
    Raises: LayoutError for what Megatron's schedule refuses.
    """
    if micro_batches < 1 or pp < 1 or vpp < 1:
        raise LayoutError(
            f"A schedule of pp={pp}, vpp={vpp}, {micro_batches} micro-batches: all three are 1 or more.", "Raise them."
        )
    if vpp == 1:
        return [_one_forward_one_backward(rank, pp, micro_batches) for rank in range(pp)]
    group_size = pp if group_size is None else group_size
    _require_interleavable(pp, vpp, micro_batches, group_size)
    return [_interleaved(rank, pp, vpp, micro_batches, group_size) for rank in range(pp)]


def warmup_forwards(rank: int, *, pp: int, vpp: int = 1, micro_batches: int, group_size: int | None = None) -> int:
    """Forward passes of `rank` before its first pair of a forward and a backward pass."""
    if vpp == 1:
        return min(pp - rank - 1, micro_batches)
    return min((pp - rank - 1) * 2 + (vpp - 1) * (group_size or pp), micro_batches * vpp)


def virtual_order(vpp: int, micro_batches: int, group_size: int) -> list[tuple[int, int]]:
    """(micro-batch, chunk) of an interleaved rank's forward passes: a group over all chunks, then the next group."""
    groups = [
        range(first, min(first + group_size, micro_batches)) for first in range(0, micro_batches, group_size)
    ]  # fmt: skip
    return [(micro_batch, chunk) for group in groups for chunk in range(vpp) for micro_batch in group]


def num_stages(table: Table) -> int:
    """pp * vpp."""
    return len(table) * (1 + max(slot.chunk for slots in table for slot in slots))


def peak_live(table: Table, weights: Sequence[float] | None = None) -> list[float]:
    """The largest amount that each rank keeps at once for later backward passes: [pp].

    Args:
        weights: size of one micro-batch's activations at each of the pp * vpp stages, in bytes or layers. Default: 1;
            the result is then a number of micro-batches, counted in each chunk.
    """
    weights = weights or [1] * num_stages(table)
    peaks = []
    for rank, slots in enumerate(table):
        held = peak = 0.0
        for slot in slots:
            sign = 1 if slot.direction is Pass.forward else -1
            held += sign * weights[slot.chunk * len(table) + rank]
            peak = max(peak, held)
        peaks.append(peak)
    return peaks


@dataclass(frozen=True, slots=True)
class Timeline:
    """A table on a time axis, in the unit of the durations passed to simulate."""

    table: Table
    starts: list[list[float]]
    """When each slot of each rank begins."""
    ends: list[list[float]]

    @property
    def total(self) -> float:
        """Time from the start of the first slot to the end of the last."""
        return max(end for ends in self.ends for end in ends)

    @property
    def busy(self) -> list[float]:
        """Time that each rank computes."""
        return [sum(ends) - sum(starts) for starts, ends in zip(self.starts, self.ends, strict=True)]


def simulate(
    table: Table, *, forward: float | Sequence[float] = 1.0, backward: float | Sequence[float] = 2.0,
    communication: float = 0.0,
) -> Timeline:  # fmt: skip
    """Places every slot on a time axis. A slot begins when its rank is free and its input has arrived.

    Args:
        forward, backward: duration of one micro-batch, for every stage or one for each of the pp * vpp.
        communication: time from the end of a slot to the arrival of its result on another rank. The sending rank
            computes meanwhile (Megatron's overlap). message_check.message_problems checks the messages themselves.
    Raises: LayoutError if the table has a deadlock.
    """
    pp, stages = len(table), num_stages(table)
    seconds = {Pass.forward: _each(forward, stages), Pass.backward: _each(backward, stages)}
    done: dict[tuple[Pass, int, int], tuple[float, int]] = {}
    starts: list[list[float]] = [[] for _ in table]
    ends: list[list[float]] = [[] for _ in table]
    waiting = set(range(pp))
    while waiting:
        moved = False
        for rank in sorted(waiting):
            while len(ends[rank]) < len(table[rank]):
                slot = table[rank][len(ends[rank])]
                stage = slot.chunk * pp + rank
                source = _input(slot, stage, stages)
                if source is not None and source not in done:
                    break
                ready, sender = done[source] if source is not None else (0.0, rank)
                start = max(ends[rank][-1] if ends[rank] else 0.0, ready + communication * (sender != rank))
                starts[rank].append(start)
                ends[rank].append(start + seconds[slot.direction][stage])
                done[slot.direction, stage, slot.micro_batch] = ends[rank][-1], rank
                moved = True
            if len(ends[rank]) == len(table[rank]):
                waiting.discard(rank)
        if not moved:
            stuck = {rank: table[rank][len(ends[rank])] for rank in sorted(waiting)}
            raise LayoutError(f"The schedule waits for itself: next slots {stuck}.", "Mend the order of its slots.")
    return Timeline(table, starts, ends)


def bubble_share(timeline: Timeline) -> float:
    """Idle time of all ranks over their computing time.

    (p - 1) / m for equal stages, (p - 1) / (v m) interleaved: arXiv:2104.04473, sections 2.2.1 and 2.2.2.
    """
    busy = sum(timeline.busy)
    return (len(timeline.table) * timeline.total - busy) / busy


def _one_forward_one_backward(rank: int, pp: int, micro_batches: int) -> list[Slot]:
    warmup = warmup_forwards(rank, pp=pp, micro_batches=micro_batches)
    order = [(micro_batch, 0) for micro_batch in range(micro_batches)]
    return _woven(warmup, order, order)


def _interleaved(rank: int, pp: int, vpp: int, micro_batches: int, group_size: int) -> list[Slot]:
    warmup = warmup_forwards(rank, pp=pp, vpp=vpp, micro_batches=micro_batches, group_size=group_size)
    order = virtual_order(vpp, micro_batches, group_size)
    return _woven(warmup, order, [(micro_batch, vpp - 1 - chunk) for micro_batch, chunk in order])


def _woven(warmup: int, forwards: list[tuple[int, int]], backwards: list[tuple[int, int]]) -> list[Slot]:
    """Warm-up forwards, then a forward and a backward in turn, then the remaining backwards."""
    slots = []
    for k in range(warmup + len(backwards)):
        if k < len(forwards):
            micro_batch, chunk = forwards[k]
            slots.append(Slot(Pass.forward, chunk, micro_batch))
        if k >= warmup:
            micro_batch, chunk = backwards[k - warmup]
            slots.append(Slot(Pass.backward, chunk, micro_batch))
    return slots


def _require_interleavable(pp: int, vpp: int, micro_batches: int, group_size: int) -> None:
    """Raises: LayoutError for what Megatron's interleaved schedule raises on."""
    rest = micro_batches % group_size if group_size else 0
    if pp == 1:
        raise LayoutError(f"parallel.vpp={vpp} needs a pipeline, but parallel.pp=1.", "Set parallel.vpp=1.")
    if not pp <= group_size <= micro_batches or 0 < rest < pp:
        raise LayoutError(
            f"The interleaved schedule (vpp={vpp}) walks {micro_batches} micro-batches in groups of {group_size}: a "
            f"group, and what is left for the last, has at least pp={pp}.",
            f"Make the micro-batches of a rank a multiple of {pp}.",
        )


def _input(slot: Slot, stage: int, stages: int) -> tuple[Pass, int, int] | None:
    """The slot whose result this one reads, (direction, stage, micro-batch); None for the first forward."""
    if slot.direction is Pass.forward:
        return (Pass.forward, stage - 1, slot.micro_batch) if stage else None
    if stage + 1 < stages:
        return Pass.backward, stage + 1, slot.micro_batch
    return Pass.forward, stage, slot.micro_batch  # the last stage's backward pass follows its own forward pass


def _each(duration: float | Sequence[float], stages: int) -> list[float]:
    values = list(duration) if isinstance(duration, Sequence) else [float(duration)] * stages
    assert len(values) == stages, f"{len(values)} durations for {stages} stages"
    return values

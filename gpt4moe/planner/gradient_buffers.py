"""How Megatron's DistributedDataParallel packs a chunk's parameters, and which part each rank's optimizer owns.

    parameters, last first | each padded to 64 elements | buckets padded to lcm(ranks, 128) | each bucket cut over ranks

Dense parameters and experts have separate buffers, because different ranks reduce them. The parameter buffer and the
fp32 gradient buffer both have this layout. A rank's optimizer keeps masters and moments of the elements that it owns,
without padding.
Source: megatron-core 0.16.1, distributed/param_and_grad_buffer.py and optimizer/distrib_optimizer.py.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from math import lcm

_PARAMETER_ALIGNMENT = 64
_BUCKET_ALIGNMENT = 128
_SMALLEST_BUCKET = 40_000_000
_BUCKET_PER_RANK = 1_000_000


@dataclass(frozen=True, slots=True)
class PackedTensor:
    """One rank's part of a parameter."""

    size: int
    """Number of elements, without padding."""
    own_bucket: bool = False
    """True for a tied embedding, so that the first and the last stage cut it in the same way."""


@dataclass(frozen=True, slots=True)
class GradientBuffer:
    """One flat buffer, and the part of it that each reducing rank owns."""

    numel: int
    """Number of elements, padding included."""
    owned_elements: list[int]
    """For each rank: parameter elements that its optimizer owns, without padding."""
    owned_tensors: list[int]
    """For each rank: number of parameters of which it owns at least one element."""


def default_bucket_size(data_parallel: int) -> int:
    """Elements at which Megatron closes a bucket by default."""
    return max(_SMALLEST_BUCKET, _BUCKET_PER_RANK * data_parallel)


def pack(tensors: Iterable[PackedTensor], ranks: int, bucket_size: int | None) -> GradientBuffer:
    """Packs the parameters of one chunk.

    Args:
        tensors: in the order of the chunk's modules.
        ranks: number of ranks that reduce the buffer: dp x cp, or expert_dp.
        bucket_size: elements at which a bucket is closed; None: one bucket.
    """
    elements, tensors_of, whole_ranks = [0] * ranks, [0] * (ranks + 1), [0] * (ranks + 1)
    start = 0
    for bucket in _buckets(reversed(list(tensors)), ranks, bucket_size):
        places, end = bucket
        share = (end - start) // ranks
        for low, high in places:
            first, last = (low - start) // share, (high - 1 - start) // share
            tensors_of[first] += 1
            tensors_of[last + 1] -= 1
            if first == last:
                elements[first] += high - low
                continue
            elements[first] += start + (first + 1) * share - low
            elements[last] += high - start - last * share
            whole_ranks[first + 1] += share  # the parameter covers every rank between its first and last one
            whole_ranks[last] -= share
        start = end
    between = accumulate(whole_ranks)
    owned = [part + whole for part, whole in zip(elements, between, strict=False)]
    return GradientBuffer(start, owned, list(accumulate(tensors_of))[:ranks])


def _buckets(
    tensors: Iterable[PackedTensor], ranks: int, bucket_size: int | None
) -> Iterable[tuple[list[tuple[int, int]], int]]:
    """For each bucket, in buffer order: (start, end) of each of its parameters, and the padded end of the bucket."""
    places: list[tuple[int, int]] = []
    start = bucket_start = 0
    for tensor in tensors:
        start = _padded(start, _PARAMETER_ALIGNMENT)
        if tensor.own_bucket and places:
            start = _padded(places[-1][1], lcm(ranks, _BUCKET_ALIGNMENT))
            yield places, start
            places, bucket_start = [], start
        end = start + tensor.size
        places.append((start, end))
        start = end
        if tensor.own_bucket or (bucket_size is not None and end - bucket_start >= bucket_size):
            start = _padded(end, lcm(ranks, _BUCKET_ALIGNMENT))
            yield places, start
            places, bucket_start = [], start
    if places:
        yield places, _padded(places[-1][1], lcm(ranks, _BUCKET_ALIGNMENT))


def _padded(number: int, divisor: int) -> int:
    return -(-number // divisor) * divisor

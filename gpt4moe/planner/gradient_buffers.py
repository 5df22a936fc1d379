"""How Megatron's DistributedDataParallel packs the parameters of a chunk, and what each rank's optimizer owns of them.

    parameters, last first | each padded to 64 elements | buckets padded to lcm(ranks, 128) | each bucket cut over ranks

Dense parameters and experts are packed apart, as different ranks reduce them. The parameter buffer and the fp32
gradient buffer both have this layout. The optimizer keeps masters and moments of a rank's own elements, unpadded.
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
    """Elements."""
    own_bucket: bool = False
    """For a tied embedding, which the first and the last stage must cut alike."""


@dataclass(frozen=True, slots=True)
class GradientBuffer:
    """One flat buffer, and what each of the ranks that reduce it owns."""

    numel: int
    """Elements with padding."""
    owned_elements: list[int]
    """Elements of parameters that each rank's optimizer owns."""
    owned_tensors: list[int]
    """Parameters of which each rank owns at least a part."""


def default_bucket_size(data_parallel: int) -> int:
    """Elements at which Megatron closes a bucket where nothing is configured."""
    return max(_SMALLEST_BUCKET, _BUCKET_PER_RANK * data_parallel)


def pack(tensors: Iterable[PackedTensor], ranks: int, bucket_size: int | None) -> GradientBuffer:
    """Packs the parameters of one chunk.

    Args:
        tensors: in the order of the chunk's modules.
        ranks: number of ranks that reduce the buffer: dp x cp, or expert_dp.
        bucket_size: elements; None: one bucket.
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
            whole_ranks[first + 1] += share  # this parameter fills every rank between its first and its last
            whole_ranks[last] -= share
        start = end
    between = accumulate(whole_ranks)
    owned = [part + whole for part, whole in zip(elements, between, strict=False)]
    return GradientBuffer(start, owned, list(accumulate(tensors_of))[:ranks])


def _buckets(
    tensors: Iterable[PackedTensor], ranks: int, bucket_size: int | None
) -> Iterable[tuple[list[tuple[int, int]], int]]:
    """For each bucket, in the buffer's order: the (start, end) of its parameters, and its padded end."""
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

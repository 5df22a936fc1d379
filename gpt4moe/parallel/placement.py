"""Which layers, experts and parts of a sequence a rank holds. No torch."""

from itertools import accumulate

from gpt4moe.config.parallel import ParallelConfig


def stage_layers(num_layers: int, parallel: ParallelConfig) -> list[list[int]]:
    """Global layer indices (from 0) of each of the pp * vpp chunks, in model order.

    Chunk c runs on pipeline rank c % pp as its virtual stage c // pp. Without `layers_per_stage` sizes are as even as
    possible, larger chunks first: 120 layers over 16 stages give eight chunks of 8 and eight of 7. An embedding or head
    that counts as a layer makes the first or last chunk one layer smaller (Megatron:
    account_for_embedding_in_pipeline_split): 7, nine of 8, five of 7, 6.
    """
    sizes = stage_sizes(num_layers, parallel)
    ends = list(accumulate(sizes))
    return [list(range(end - size, end)) for end, size in zip(ends, sizes, strict=True)]


def stage_sizes(num_layers: int, parallel: ParallelConfig) -> list[int]:
    """The number of layers of each of the pp * vpp chunks (stage_layers)."""
    return parallel.layers_per_stage or _even_sizes(num_layers, parallel)


def _even_sizes(num_layers: int, parallel: ParallelConfig) -> list[int]:
    embedding, head = int(parallel.embedding_counts_as_layer), int(parallel.head_counts_as_layer)
    num_chunks = parallel.pp * parallel.vpp
    base, extra = divmod(num_layers + embedding + head, num_chunks)
    sizes = [base + (chunk < extra) for chunk in range(num_chunks)]
    sizes[0] -= embedding
    sizes[-1] -= head
    return sizes


def rank_chunks(num_layers: int, parallel: ParallelConfig, pp_index: int) -> list[list[int]]:
    """Global layer indices of each virtual stage of one pipeline rank."""
    return stage_layers(num_layers, parallel)[pp_index :: parallel.pp]


def local_experts(num_experts: int, ep: int, ep_index: int) -> range:
    """Global ids of the experts that one expert-parallel rank holds: a contiguous block."""
    count = num_experts // ep
    return range(ep_index * count, (ep_index + 1) * count)


def sequence_chunks(cp: int, cp_index: int) -> tuple[int, ...]:
    """The indices of the chunks of a sequence that a context-parallel rank holds, in the rank's order.

    A sequence has 2 cp chunks. The rank holds the chunk at cp_index and the chunk as far from the end, as Megatron's
    rotary embedding expects. Under a causal mask all ranks then do the same work.
    """
    return (0,) if cp == 1 else (cp_index, 2 * cp - 1 - cp_index)

"""Which samples a data-parallel rank's micro-batches hold: arithmetic on consumed_samples, a run's whole data state.

A step takes the next `global_batch_size` samples. Micro-batch j of it holds the same samples on every layout, and rank
r of dp takes micro-batches r, r + dp, r + 2 dp, ...: a loss that pools over a micro-batch is the same everywhere.
"""


def micro_batch_samples(
    consumed_samples: int, *, global_batch_size: int, micro_batch_size: int, dp: int, dp_index: int
) -> list[range]:
    """Sample numbers of each micro-batch of one step on one rank.

    Raises: ValueError when global_batch_size is no multiple of micro_batch_size * dp.
    """
    if global_batch_size % (micro_batch_size * dp) or not 0 <= dp_index < dp:
        raise ValueError(f"global batch {global_batch_size} over micro-batch {micro_batch_size} x dp {dp}, {dp_index=}")
    starts = range(consumed_samples, consumed_samples + global_batch_size, micro_batch_size)
    return [range(start, start + micro_batch_size) for start in starts[dp_index::dp]]

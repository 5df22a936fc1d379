"""Micro-batches by arithmetic: the same sets of samples on every layout, each exactly once."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt4moe.data.loader import micro_batch_samples


@given(
    dp=st.integers(1, 7), micro_batch_size=st.integers(1, 4), rounds=st.integers(1, 5), consumed=st.integers(0, 10**12)
)
def test_ranks_together_take_each_sample_of_the_step_once(
    dp: int, micro_batch_size: int, rounds: int, consumed: int
) -> None:
    batch = dp * micro_batch_size * rounds
    taken = [
        n
        for rank in range(dp)
        for micro_batch in micro_batch_samples(
            consumed, global_batch_size=batch, micro_batch_size=micro_batch_size, dp=dp, dp_index=rank
        )
        for n in micro_batch
    ]
    assert sorted(taken) == list(range(consumed, consumed + batch))


@pytest.mark.parametrize("dp", [2, 3, 6])
def test_micro_batches_are_those_of_one_rank_dealt_out_in_turn(dp: int) -> None:
    alone = micro_batch_samples(48, global_batch_size=24, micro_batch_size=2, dp=1, dp_index=0)
    for rank in range(dp):
        dealt = micro_batch_samples(48, global_batch_size=24, micro_batch_size=2, dp=dp, dp_index=rank)
        assert dealt == alone[rank::dp]


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="micro-batch 2 x dp 3"):
        micro_batch_samples(0, global_batch_size=16, micro_batch_size=2, dp=3, dp_index=0)

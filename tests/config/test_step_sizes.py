"""Batch sizes of a ramp: every sample in one step, the same sizes as Megatron-LM's, and what makes no sense refused."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.num_microbatches_calculator import RampupBatchsizeNumMicroBatchesCalculator

from gpt4moe.config.load import load_run_config
from gpt4moe.config.step_sizes import BatchLevelConfig, StepSizes
from gpt4moe.errors import ConfigError


def levels(*pairs: tuple[int, float]) -> list[BatchLevelConfig]:
    return [BatchLevelConfig(global_batch_size=size, until_samples=until) for size, until in pairs]


RAMP = StepSizes(levels((4, 10), (8, 32)), 16)


def test_a_level_ends_with_the_step_that_reaches_its_samples() -> None:
    assert [RAMP.at_step(step).global_batch_size for step in range(1, 9)] == [4, 4, 4, 8, 8, 8, 16, 16]
    assert [RAMP.samples(steps) for steps in range(9)] == [0, 4, 8, 12, 20, 28, 36, 52, 68]


def test_without_a_ramp_every_step_has_one_size() -> None:
    sizes = StepSizes([], 16)
    assert [sizes.samples(steps) for steps in (0, 1, 10**9)] == [0, 16, 16 * 10**9]
    assert sizes.at_step(7) == sizes.at_sample(96) == sizes.spans[0]


@settings(max_examples=60)
@given(rises=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 400)), max_size=4), steps=st.integers(1, 200))
def test_steps_and_samples_count_the_same(rises: list[tuple[int, int]], steps: int) -> None:
    size = until = 0
    ramp = []
    for more, samples in rises:
        size, until = size + more, until + samples + size
        ramp.append((size, float(until)))
    sizes, consumed = StepSizes(levels(*ramp), size + 5), 0
    for step in range(1, steps + 1):
        assert sizes.samples(step - 1) == consumed
        assert sizes.at_step(step) == sizes.at_sample(consumed)
        consumed += sizes.at_step(step).global_batch_size
        assert sizes.steps(consumed) == step
        assert sizes.steps(consumed - 0.5) == step - 1


def test_megatrons_three_numbers_as_levels_give_the_sizes_of_its_own_calculator() -> None:
    start, increment, samples, batch = 32, 32, 5000, 256
    rises = (batch - start) // increment
    ours = StepSizes(levels(*((start + increment * at, samples * (at + 1) / rises) for at in range(rises))), batch)
    theirs = RampupBatchsizeNumMicroBatchesCalculator(
        rank=1, global_batch_size=batch, micro_batch_size=4, data_parallel_size=2,
        decrease_batch_size_if_needed=False, start_global_batch_size=start, batch_size_increment=increment,
        ramup_samples=samples,
    )  # fmt: skip
    consumed = 0
    for step in range(1, 60):
        theirs.update(consumed, consistency_check=True)
        assert ours.at_step(step).global_batch_size == theirs.get_current_global_batch_size()
        consumed += theirs.get_current_global_batch_size()
    assert ours.spans[-1].first_step < 60


@pytest.mark.parametrize(
    ("ramp", "words"),
    [
        ("[{global_batch_size: 16, until_samples: 9}]", "=16 is not between 0 and training.global_batch_size=16"),
        ("[{global_batch_size: 0, until_samples: 9}]", "=0 is not between 0"),
        ("[{global_batch_size: 8, until_samples: 9}, {global_batch_size: 8, until_samples: 99}]", "not between 8"),
        ("[{global_batch_size: 3, until_samples: 9}]", "=3 is no multiple of training.micro_batch_size=2"),
        ("[{global_batch_size: 4, until_samples: 0}]", "until_samples=0 does not follow 0"),
        ("[{global_batch_size: 4, until_samples: nan}]", "until_samples=nan does not follow 0"),
        ("[{global_batch_size: 4, until_samples: 9}, {global_batch_size: 8, until_samples: 9}]", "not follow 9"),
        ("[{global_batch_size: 4, until_samples: 9}, {global_batch_size: 8, until_samples: 11}]", "[1] has no step"),
        ("[{global_batch_size: 4}]", "until_samples"),
        ("[{global_batch_size: 4, until_sample: 9}]", "until_sample"),
    ],
)  # fmt: skip
def test_a_ramp_that_makes_no_sense_is_refused(ramp: str, words: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        load_run_config(
            ["+experiment=tiny", "run.name=t", "training.micro_batch_size=2", f"training.batch_ramp={ramp}"]
        )
    assert words in refusal.value.cause

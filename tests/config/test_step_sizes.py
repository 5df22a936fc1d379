"""Batch sizes of a ramp: every sample in one step, the same sizes as Megatron-LM's, and what makes no sense refused."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.num_microbatches_calculator import RampupBatchsizeNumMicroBatchesCalculator

from gpt4moe.config.load import load_run_config
from gpt4moe.config.step_sizes import BatchLevelConfig, LengthLevelConfig, StepSizes
from gpt4moe.errors import ConfigError

SEQ = 8


def levels(*pairs: tuple[int, float]) -> list[BatchLevelConfig]:
    return [BatchLevelConfig(global_batch_size=size, until_samples=until) for size, until in pairs]


RAMP = StepSizes(levels((4, 10), (8, 32)), 16, SEQ)


def test_a_level_ends_with_the_step_that_reaches_its_samples() -> None:
    assert [RAMP.at_step(step).global_batch_size for step in range(1, 9)] == [4, 4, 4, 8, 8, 8, 16, 16]
    assert [RAMP.samples(steps) for steps in range(9)] == [0, 4, 8, 12, 20, 28, 36, 52, 68]


def test_without_a_ramp_every_step_has_one_size() -> None:
    sizes = StepSizes([], 16, SEQ)
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
    sizes, consumed = StepSizes(levels(*ramp), size + 5, SEQ), 0
    for step in range(1, steps + 1):
        assert sizes.samples(step - 1) == consumed
        assert sizes.at_step(step) == sizes.at_sample(consumed)
        consumed += sizes.at_step(step).global_batch_size
        assert sizes.steps(consumed * SEQ) == step
        assert sizes.steps(consumed * SEQ - 0.5) == step - 1


def test_megatrons_three_numbers_as_levels_give_the_sizes_of_its_own_calculator() -> None:
    start, increment, samples, batch = 32, 32, 5000, 256
    rises = (batch - start) // increment
    ours = StepSizes(levels(*((start + increment * at, samples * (at + 1) / rises) for at in range(rises))), batch, SEQ)
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


def lengths(*triples: tuple[int, int, int | None]) -> list[LengthLevelConfig]:
    return [LengthLevelConfig(seq_length=s, until_step=step, global_batch_size=size) for s, step, size in triples]


def test_a_ramp_of_the_batch_and_one_of_the_length_count_together() -> None:
    sizes = StepSizes(levels((4, 10), (8, 32)), 16, 64, lengths((16, 2, None), (32, 7, None)))
    shapes = [(sizes.at_step(step).global_batch_size, sizes.at_step(step).seq_length) for step in range(1, 9)]
    assert shapes == [(4, 16), (4, 16), (4, 32), (8, 32), (8, 32), (8, 32), (16, 32), (16, 64)]
    assert sizes.lengths() == [(0, 16), (8, 32), (52, 64)]
    assert [sizes.tokens(steps) for steps in range(9)] == [0, 64, 128, 256, 512, 768, 1024, 1536, 2560]
    assert [sizes.samples_until(tokens) for tokens in (0, 0.5, 64, 129, 160, 161, 1536, 1537)] == [
        0, 1, 4, 9, 9, 10, 52, 53,
    ]  # fmt: skip


def test_a_length_may_say_its_own_batch_so_that_every_step_has_as_many_tokens() -> None:
    sizes = StepSizes(levels((4, 10)), 2, 64, lengths((16, 5, 8), (32, 7, 4)))
    assert [sizes.at_step(step).global_batch_size for step in range(1, 10)] == [4, 4, 4, 8, 8, 4, 4, 2, 2]
    assert {sizes.at_step(step).tokens_per_step for step in range(4, 10)} == {128}


@settings(max_examples=60)
@given(
    rises=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 400)), max_size=3),
    changes=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 40)), max_size=3),
)
def test_steps_samples_and_tokens_count_the_same(rises: list[tuple[int, int]], changes: list[tuple[int, int]]) -> None:
    size = until = 0
    ramp = []
    for more, count in rises:
        size, until = size + more, until + count + size
        ramp.append((size, float(until)))
    length, step, shorter = 1, 0, []
    for times, steps in changes:
        length, step = length * (times + 1), step + steps
        shorter.append((length, step, None))
    sizes = StepSizes(levels(*ramp), size + 5, 2 * length, lengths(*shorter))
    samples = tokens = 0
    for step in range(1, 150):
        span = sizes.at_step(step)
        assert (sizes.samples(step - 1), sizes.tokens(step - 1)) == (samples, tokens)
        assert span == sizes.at_sample(samples)
        assert sizes.samples_until(tokens) == samples
        samples, tokens = samples + span.global_batch_size, tokens + span.tokens_per_step
        assert sizes.steps(tokens) == step
        assert sizes.steps(tokens - 0.5) == step - 1
        assert sizes.samples_until(max(0.0, tokens - span.seq_length - 0.5)) == samples - 1
    counted = sizes.within(149)
    assert sum(count * span.tokens_per_step for span, count in counted) == tokens


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["[{seq_length: 256, until_step: 9}]"], "seq_length=256 is not between 0 and model.seq_length=256"),
        (["[{seq_length: 0, until_step: 9}]"], "=0 is not between 0"),
        (["[{seq_length: 64, until_step: 9}, {seq_length: 32, until_step: 19}]"], "seq_length=32 is not between 64"),
        (["[{seq_length: 100, until_step: 9}]"], "=100 does not divide model.seq_length=256"),
        (["[{seq_length: 64, until_step: 0}]"], "until_step=0 does not follow 0"),
        (["[{seq_length: 64, until_step: 9}, {seq_length: 128, until_step: 9}]"], "until_step=9 does not follow 9"),
        (["[{seq_length: 64, until_step: 9, global_batch_size: 3}]"], "=3 is no multiple of training.micro_batch"),
        (["[{seq_length: 64, until_step: 9}]", "stage=sft", "data.path=x"], "stage.kind=sft: only running text"),
        (
            ["[{seq_length: 64, until_step: 2, global_batch_size: 8}]",
             "training.batch_ramp=[{global_batch_size: 4, until_samples: 12}]"],
            "ends with step 3, and training.length_ramp[0] before, with step 2",
        ),
        (
            ["[{seq_length: 64, until_step: 9, global_batch_size: 8}]",
             "training.batch_ramp=[{global_batch_size: 8, until_samples: 12}]"],
            "=8 is not between 0 and training.length_ramp[0].global_batch_size=8",
        ),
    ],
)  # fmt: skip
def test_lengths_that_make_no_sense_are_refused(overrides: list[str], words: str) -> None:
    ramp, *others = overrides
    with pytest.raises(ConfigError) as refused:
        load_run_config(
            ["+experiment=tiny", "run.name=t", "training.micro_batch_size=2", f"training.length_ramp={ramp}", *others]
        )
    assert words in refused.value.cause
    assert refused.value.cure


def test_the_cure_of_a_length_that_does_not_divide_is_the_nearest_that_does() -> None:
    with pytest.raises(ConfigError) as refused:
        load_run_config(["+experiment=tiny", "run.name=t", "training.length_ramp=[{seq_length: 100, until_step: 9}]"])
    assert "Set it to 128" in refused.value.cure


@pytest.mark.parametrize(
    "level",
    ["{global_batch_size: -4, until_samples: 12}", "{global_batch_size: 0, until_samples: 12}",
     "{global_batch_size: 4, until_samples: 0}", "{global_batch_size: 4, until_samples: -3}"],
)  # fmt: skip
def test_a_bad_batch_ramp_is_refused_beside_lengths_that_say_their_batches(level: str) -> None:
    """Steps of both are counted only after each was found good: counting these would never end."""
    with pytest.raises(ConfigError, match=r"training.batch_ramp\[0\]"):
        load_run_config([
            "+experiment=tiny", "run.name=t", f"training.batch_ramp=[{level}]",
            "training.length_ramp=[{seq_length: 64, until_step: 9, global_batch_size: 8}]",
        ])  # fmt: skip

"""build_data: the same samples on every layout and after every restart; epochs reshuffle; held-out text stays put."""

from collections import Counter
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from gpt4moe.config.run import RunConfig
from gpt4moe.data.batch import Batch, stack
from gpt4moe.data.check import check_data
from gpt4moe.data.loader import build_data
from gpt4moe.data.tokenizer import Tokenizer
from gpt4moe.errors import ConfigError, DataError
from tests.data.conftest import SEQ_LENGTH, shard, small_run


def tokens_of(run: RunConfig, consumed: int, dp: int) -> torch.Tensor:
    """Tokens of one step of 12 samples in micro-batches of 2, gathered from dp ranks into the order of one."""
    ranks = [
        build_data(run).train.micro_batches(consumed, global_batch_size=12, micro_batch_size=2, dp=dp, dp_index=rank)
        for rank in range(dp)
    ]
    return torch.stack([ranks[j % dp][j // dp].tokens for j in range(6)])


@pytest.mark.parametrize("dp", [2, 3, 6])
def test_micro_batches_hold_the_same_samples_on_every_layout(data_folder: Path, dp: int) -> None:
    run = small_run(data_folder)
    assert torch.equal(tokens_of(run, 24, dp), tokens_of(run, 24, 1))


@pytest.mark.parametrize("document_mask", [False, True])
def test_the_micro_batches_of_a_step_are_its_samples_one_by_one(in_shards: Path, document_mask: bool) -> None:
    ramp = "training.length_ramp=[{seq_length: 8, until_step: 4}]"
    run = small_run(in_shards, f"data.document_mask={document_mask}", "training.global_batch_size=12", ramp)
    stream, alone = build_data(run).train, build_data(run).train
    for consumed in (0, 12, 24, 36, 48, 60, 72, 600, 12, 3, 54):  # next steps, a jump, back, and out of step
        made = stream.micro_batches(consumed, global_batch_size=6, micro_batch_size=3, dp=2, dp_index=1)
        numbers = range(consumed + 3, consumed + 6)
        wanted = stack([alone.sample(n) for n in numbers], numbers)
        for name in (field.name for field in fields(Batch)):
            found, right = getattr(made[0], name), getattr(wanted, name)
            if isinstance(right, torch.Tensor):
                assert torch.equal(found, right) and found.dtype == right.dtype, (consumed, name)
            else:
                assert found == right, name


def test_a_step_has_samples_of_one_length(in_shards: Path) -> None:
    ramp = "training.length_ramp=[{seq_length: 8, until_step: 4}]"
    run = small_run(in_shards, "training.global_batch_size=12", ramp)
    change = run.step_sizes.lengths()[1][0]
    with pytest.raises(ValueError, match=f"samples {change - 12} to {change + 11} are of several lengths"):
        build_data(run).train.micro_batches(change - 12, global_batch_size=24, micro_batch_size=3, dp=1, dp_index=0)


def test_a_restart_goes_on_with_the_samples_that_were_next(data_folder: Path) -> None:
    stream = build_data(small_run(data_folder)).train
    whole = stream.micro_batches(0, global_batch_size=12, micro_batch_size=2, dp=1, dp_index=0)
    rest = stream.micro_batches(8, global_batch_size=4, micro_batch_size=2, dp=1, dp_index=0)
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(whole[4:], rest, strict=True))


def test_samples_are_stretches_of_the_files(data_folder: Path) -> None:
    data = build_data(small_run(data_folder, "+data.sources.alpha=1"))
    stream = shard(data_folder, "alpha", "train").tokens.tolist()
    wanted = {tuple(stream[i : i + SEQ_LENGTH + 1]) for i in range(0, len(stream) - SEQ_LENGTH, SEQ_LENGTH)}
    assert {tuple(data.train.sample(n).tokens.tolist()) for n in range(len(wanted))} == wanted


def test_the_second_epoch_has_the_same_samples_in_another_order(data_folder: Path) -> None:
    data = build_data(small_run(data_folder, "+data.sources.alpha=1"))
    size = (shard(data_folder, "alpha", "train").num_tokens - 1) // SEQ_LENGTH
    first, second = ([data.train.sample(e * size + n).tokens.tobytes() for n in range(size)] for e in (0, 1))
    assert first != second
    assert Counter(first) == Counter(second)


def test_held_out_samples_are_the_same_for_every_seed_and_every_pass(data_folder: Path) -> None:
    one, two = (
        build_data(small_run(data_folder, "+data.sources.beta=1", f"run.seed={seed}")).validation for seed in (1, 2)
    )
    size = (shard(data_folder, "beta", "valid").num_tokens - 1) // SEQ_LENGTH
    for n in range(size):
        assert (one.sample(n).tokens == two.sample(n + size).tokens).all()


def test_another_seed_trains_in_another_order(data_folder: Path) -> None:
    first, second = (tokens_of(small_run(data_folder, f"run.seed={seed}"), 0, 1) for seed in (1, 2))
    assert not torch.equal(first, second)


def test_without_weights_sources_count_by_their_tokens(data_folder: Path) -> None:
    data = build_data(small_run(data_folder))
    alpha, beta = (shard(data_folder, name, "train").num_tokens for name in ("alpha", "beta"))
    share = data.train.samples.mixture.consumed(1000)["alpha"] / 1000
    assert data.source_names == ["alpha", "beta"]
    assert share == pytest.approx(alpha / (alpha + beta), abs=0.001)


def test_synthetic_tokens_need_no_files() -> None:
    data = build_data(small_run(None))
    (batch,) = data.train.micro_batches(0, global_batch_size=3, micro_batch_size=3, dp=1, dp_index=0)
    assert batch.tokens.shape == batch.labels.shape == batch.loss_mask.shape == batch.position_ids.shape == (3, 16)
    assert (batch.tokens.dtype, batch.loss_mask.dtype) == (torch.int64, torch.float32)
    assert data.tokenizer is None
    assert (data.train.sample(0).tokens != data.validation.sample(0).tokens).any()


def test_held_out_samples_have_shares_of_their_own(data_folder: Path) -> None:
    data = build_data(
        small_run(data_folder, "+data.sources.alpha=1", "++data.validation.beta=3", "++data.validation.alpha=1")
    )
    assert data.source_names == ["alpha", "beta"]
    found = Counter(data.validation.sample(n).source_index for n in range(1000))
    assert found == {0: 250, 1: 750}
    assert {data.train.sample(n).source_index for n in range(100)} == {0}
    assert data.consumed_per_source(7) == {"alpha": 7}


def test_shares_of_held_out_samples_change_no_training_sample(data_folder: Path) -> None:
    plain, other = small_run(data_folder), small_run(data_folder, "++data.validation.beta=1")
    assert torch.equal(tokens_of(plain, 24, 1), tokens_of(other, 24, 1))
    assert check_data(plain).identity == check_data(other).identity


def test_an_unknown_held_out_source_is_refused(data_folder: Path) -> None:
    with pytest.raises(DataError, match=r"data\.validation\.gamma is not in the data folder"):
        build_data(small_run(data_folder, "++data.validation.gamma=1"))
    with pytest.raises(ConfigError, match=r"data\.validation has no share above 0"):
        small_run(data_folder, "++data.validation.beta=0")


def test_samples_have_the_documents_of_their_files(data_folder: Path, tokenizer: Tokenizer) -> None:
    plain, parted = (build_data(small_run(data_folder, f"data.document_mask={mask}")) for mask in ("false", "true"))
    for of_plain, of_parted in ((plain.train, parted.train), (plain.validation, parted.validation)):
        for n in range(30):
            sample, whole = of_parted.sample(n), of_plain.sample(n)
            np.testing.assert_array_equal(sample.tokens, whole.tokens)
            is_last = sample.tokens[:-1] == tokenizer.eos_id
            assert sample.documents is not None and whole.documents is None
            np.testing.assert_array_equal(sample.documents, np.cumsum(is_last) - is_last)
            np.testing.assert_array_equal(sample.loss_mask, ~is_last)
            assert sample.source_index == whole.source_index and whole.loss_mask.all()

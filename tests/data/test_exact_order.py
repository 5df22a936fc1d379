"""The order of samples has one md5, however a run is cut over ranks, micro-batches, launches and length."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from gpt4moe.data.loader import build_data, micro_batch_samples
from gpt4moe.data.mixed import MixedSamples
from gpt4moe.data.mixture import Phase, PhasedMixture
from tests.data.conftest import SEQ_LENGTH, small_run

NUM_SAMPLES = 10**6
SIZES = {"web": 50_000_000, "code": 37_000, "prose": 11_000}
PHASES = [Phase(0, {"code": 0.1, "prose": 0.2334, "web": 0.6666}), Phase(700_001, {"web": 0.5, "prose": 0.5})]
CODES = {name: code for code, name in enumerate(("web", "code", "prose", "books"))}
"""Numbers of the sources that do not change when a source is added."""
MD5 = "8a0b590e7bd99b98f1f290261617422b"
"""Of (source, epoch, index) of the first 10^6 samples. Who changes it changes what every run of today reads next."""


def samples(phases: list[Phase] = PHASES) -> MixedSamples:
    """As a launch makes them, with nothing kept from another one."""
    sizes = SIZES | {"books": 900}
    streams = dict.fromkeys(sizes, np.empty(0))
    return MixedSamples(streams, sorted(sizes), PhasedMixture(sizes, phases, seed=1234), 128, 1234, True)


def trace(numbers: NDArray[np.int64], phases: list[Phase] = PHASES) -> NDArray[np.int64]:
    """[samples, 3]: source, epoch and index of each."""
    read = samples(phases)
    draws, index = read.places(numbers)
    return np.stack([np.array([CODES[name] for name in read.mixture.names])[draws.source], draws.epoch, index], axis=1)


def md5(rows: NDArray[np.int64]) -> str:
    return hashlib.md5(rows.astype("<i8").tobytes(), usedforsecurity=False).hexdigest()


def test_the_order_of_the_first_million_samples_never_changes() -> None:
    assert md5(trace(np.arange(NUM_SAMPLES))) == MD5


@pytest.mark.parametrize(("dp", "micro_batch_size"), [(2, 1), (4, 5), (8, 125)])
def test_it_is_the_same_on_every_data_parallel_size_and_micro_batch(dp: int, micro_batch_size: int) -> None:
    batch, found = 1000, []
    for rank in range(dp):
        numbers = [
            list(map(list, micro_batch_samples(
                n, global_batch_size=batch, micro_batch_size=micro_batch_size, dp=dp, dp_index=rank
            )))
            for n in range(0, NUM_SAMPLES, batch)
        ]  # fmt: skip
        of_rank = np.array(numbers)  # [steps, micro-batches, B]
        found.append(trace(of_rank.reshape(-1)).reshape(*of_rank.shape, 3))
    assert md5(np.stack(found, axis=2)) == MD5  # rank r has micro-batches r, r + dp, ... of a step


def launches(seed: int, batch: int, save_every: int) -> Iterator[tuple[int, int]]:
    """(first, end) samples of launches that are killed anywhere and go on from their last checkpoint."""
    generator, saved = np.random.default_rng(seed), 0
    while True:
        end = min(saved + int(generator.integers(1, 300)) * batch, NUM_SAMPLES)
        yield saved, end
        if end == NUM_SAMPLES:
            return
        saved = end // (save_every * batch) * save_every * batch


@pytest.mark.parametrize(("batch", "save_every"), [(1000, 7), (640, 100)])
def test_it_is_the_same_after_any_kills_and_restarts(batch: int, save_every: int) -> None:
    whole, count, redone = np.full((NUM_SAMPLES, 3), -1), 0, 0
    for first, end in launches(batch, batch, save_every):
        found, before = trace(np.arange(first, end)), whole[first:end]
        is_again = before[:, 0] >= 0
        assert (found[is_again] == before[is_again]).all()
        whole[first:end], count, redone = found, count + 1, redone + int(is_again.sum())
    assert md5(whole) == MD5
    assert count > 5
    assert redone > 0


def test_it_is_the_same_whatever_is_asked_first() -> None:
    numbers = np.random.default_rng(1).permutation(NUM_SAMPLES)
    whole = np.empty((NUM_SAMPLES, 3), dtype=np.int64)
    whole[numbers] = trace(numbers)
    assert md5(whole) == MD5


def test_it_is_the_same_in_a_run_of_twice_the_length_with_a_source_that_comes_later() -> None:
    later = [*PHASES, Phase(NUM_SAMPLES + 1, {"books": 0.4, "web": 0.6})]
    whole = trace(np.arange(2 * NUM_SAMPLES), later)
    assert md5(whole[:NUM_SAMPLES]) == MD5
    assert CODES["books"] in whole[NUM_SAMPLES:, 0]


def test_one_sample_is_that_of_many() -> None:
    read, rows = samples(), trace(np.arange(NUM_SAMPLES))
    for n in [*range(2000), *range(699_900, 700_100), NUM_SAMPLES - 1]:
        draw, index = read.place(n)
        assert (CODES[draw.source], draw.epoch, index) == tuple(rows[n])


NUM_READ = 2400
BEYOND = f"data.phases=[{{from_tokens: {NUM_READ * SEQ_LENGTH}, shares: {{alpha: 1, beta: 3}}}}]"


def md5_of_tokens(folder: Path, *overrides: str, dp: int, micro_batch_size: int, batch: int) -> str:
    """Of the tokens of the first NUM_READ samples; every step has a launch of its own."""
    found = []
    for first in range(0, NUM_READ, batch):
        stream = build_data(small_run(folder, "++data.sources={alpha: 1}", *overrides)).train
        ranks = [
            stream.micro_batches(
                first, global_batch_size=batch, micro_batch_size=micro_batch_size, dp=dp, dp_index=rank
            )
            for rank in range(dp)
        ]
        found += [ranks[j % dp][j // dp].tokens.numpy() for j in range(batch // micro_batch_size)]
    return md5(np.concatenate(found))


def test_tokens_are_the_same_too(data_folder: Path) -> None:
    first = md5_of_tokens(data_folder, dp=1, micro_batch_size=1, batch=NUM_READ)
    for dp, micro_batch_size, batch in [(2, 3, 600), (4, 1, 800), (8, 5, 240)]:
        cut = {"dp": dp, "micro_batch_size": micro_batch_size, "batch": batch}
        assert md5_of_tokens(data_folder, "training.steps=9999", BEYOND, **cut) == first

"""Samples whose length changes at a step: one order however the run is cut, no token twice, little left over."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from gpt4moe.config.run import RunConfig
from gpt4moe.data.blend import phases_of, uses
from gpt4moe.data.check import check_data
from gpt4moe.data.loader import build_data
from gpt4moe.data.mixed import MixedSamples
from gpt4moe.data.mixture import Part, Phase, PhasedMixture
from tests.data.conftest import SEQ_LENGTH, small_run
from tests.data.mixture_tool import RUN, answer

WINDOW, PIECE = 64, 8
"""Tokens of the longest and of the shortest sample."""
SIZES = {"code": 101, "prose": 60, "web": 997}
PHASES = [Phase(0, {"code": 0.2, "web": 0.8}), Phase(6_500, {"code": 0.3, "prose": 0.3, "web": 0.4})]
PARTS = [Part(0, 8), Part(5_003, 2), Part(6_001, 1)]
NUM_SAMPLES = 9_000
MD5 = "f00aa761863cf7e05d21544b4533310c"
"""Of (source, epoch, first token) of these samples. Who changes it changes what every such run of today reads next."""


def samples(parts: list[Part] = PARTS, phases: list[Phase] = PHASES) -> MixedSamples:
    mixture = PhasedMixture(SIZES, phases, seed=1234, parts=parts)
    return MixedSamples(dict.fromkeys(SIZES, np.empty(0)), sorted(SIZES), mixture, WINDOW, 1234, True)


def trace(read: MixedSamples, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """[samples, 4]: source, epoch, first token in the source's stream, tokens."""
    draws, index = read.places(numbers)
    length = WINDOW // np.array([part.pieces for part in read.mixture.parts])[draws.part]
    return np.stack([draws.source, draws.epoch, index * length, length], axis=1)


def test_the_order_never_changes_and_is_the_same_whatever_is_asked_first() -> None:
    whole = trace(samples(), np.arange(NUM_SAMPLES))
    assert hashlib.md5(whole[:, :3].astype("<i8").tobytes(), usedforsecurity=False).hexdigest() == MD5
    numbers = np.random.default_rng(1).permutation(NUM_SAMPLES)
    assert (trace(samples(), numbers) == whole[numbers]).all()
    read = samples()
    for n in [*range(0, NUM_SAMPLES, 37), *range(5_000, 5_006), *range(5_999, 6_003)]:
        draw, index = read.place(n)
        length = read.length_of(draw)
        assert (read.mixture.names.index(draw.source), draw.epoch, index * length, length) == tuple(whole[n])


def test_no_token_is_read_twice_in_an_epoch_and_a_change_leaves_less_than_a_window_of_each_source() -> None:
    whole, last = trace(samples(), np.arange(NUM_SAMPLES)), samples().mixture.consumed(NUM_SAMPLES)
    left = dict.fromkeys(SIZES, 0)
    for source, (name, windows) in enumerate(SIZES.items()):
        mine = whole[whole[:, 0] == source]
        assert mine[-1, 1] >= (name == "code"), "code is read more than once"
        for epoch in range(mine[:, 1].max() + 1):
            rows = mine[mine[:, 1] == epoch]
            units = np.concatenate([np.arange(first, first + length, PIECE) for _, _, first, length in rows]) // PIECE
            times = np.bincount(units, minlength=windows * WINDOW // PIECE)
            assert times.max() == 1
            if epoch < mine[:, 1].max():  # it is over
                left[name] += PIECE * int((times == 0).sum())
    assert all(tokens < WINDOW * (len(PARTS) - 1) for tokens in left.values())
    assert left["code"] > 0, "a change fell into the middle of a window"
    assert sum(last.values()) == NUM_SAMPLES


def test_pieces_of_a_window_are_not_neighbours() -> None:
    first = trace(samples(), np.arange(1_000))
    web = first[first[:, 0] == 2, 2] // WINDOW
    assert (np.diff(web) == 0).mean() < 0.02


def test_later_changes_and_phases_change_no_earlier_sample() -> None:
    whole = trace(samples(), np.arange(NUM_SAMPLES))
    other = [PHASES[0], Phase(6_500, {"code": 0.1, "prose": 0.8, "web": 0.1})]
    for parts, phases, until in (([*PARTS[:1], Part(5_003, 1)], PHASES, 5_003), (PARTS, other, 6_500)):
        assert (trace(samples(parts, phases), np.arange(until)) == whole[:until]).all()


RAMP = "training.length_ramp=[{seq_length: 4, until_step: 3}, {seq_length: 8, until_step: 5, global_batch_size: 12}]"
STEPS, BATCH = 9, 24


def run_of(folder: Path, *overrides: str) -> RunConfig:
    return small_run(folder, f"training.global_batch_size={BATCH}", f"training.steps={STEPS}", RAMP, *overrides)


def step_tokens(run: RunConfig, step: int, dp: int, micro_batch_size: int) -> NDArray[np.int64]:
    """[samples, S] of a step, gathered from dp ranks; every step has a launch of its own."""
    sizes, stream = run.step_sizes, build_data(run).train
    size = sizes.at_step(step).global_batch_size
    ranks = [
        stream.micro_batches(
            sizes.samples(step - 1), global_batch_size=size, micro_batch_size=micro_batch_size, dp=dp, dp_index=rank
        )
        for rank in range(dp)
    ]
    return np.concatenate([ranks[j % dp][j // dp].tokens.numpy() for j in range(size // micro_batch_size)])


@pytest.mark.parametrize("document_mask", [False, True])
def test_steps_have_their_length_and_the_same_tokens_on_every_layout(data_folder: Path, document_mask: bool) -> None:
    documents = f"data.document_mask={document_mask}"
    alone = [step_tokens(run_of(data_folder, documents), step, 1, 1) for step in range(1, STEPS + 1)]
    assert [tokens.shape for tokens in alone] == [(24, 4)] * 3 + [(12, 8)] * 2 + [(24, SEQ_LENGTH)] * 4
    longer = run_of(data_folder, documents, "training.steps=99")
    for step, tokens in enumerate(alone, start=1):
        for dp, micro_batch_size in ((2, 3), (4, 1), (12, 1)):
            assert (step_tokens(longer, step, dp, micro_batch_size) == tokens).all()


def test_a_batch_ramp_reads_the_same_samples_where_lengths_change_at_the_same_ones(data_folder: Path) -> None:
    ramp = "training.length_ramp=[{seq_length: 4, until_step: 2}]"
    plain = small_run(data_folder, "training.global_batch_size=24", ramp)
    ramped = small_run(
        data_folder, "training.global_batch_size=24", ramp.replace("2}", "3}"),
        "training.batch_ramp=[{global_batch_size: 12, until_samples: 24}]",
    )  # fmt: skip
    assert plain.step_sizes.lengths() == ramped.step_sizes.lengths() == [(0, 4), (48, SEQ_LENGTH)]
    read, again = (build_data(run).train for run in (plain, ramped))
    assert all((read.sample(n).tokens == again.sample(n).tokens).all() for n in range(96))


def test_held_out_samples_have_the_longest_length_and_are_those_of_a_run_without_a_change(data_folder: Path) -> None:
    changing, steady = run_of(data_folder), small_run(data_folder)
    for n in range(8):
        sample = build_data(changing).validation.sample(n)
        assert len(sample.tokens) == SEQ_LENGTH + 1
        assert (sample.tokens == build_data(steady).validation.sample(n).tokens).all()


def test_uses_count_tokens_and_epochs_over_a_change(data_folder: Path) -> None:
    run = run_of(data_folder, "++data.sources={alpha: 1, beta: 1}", "training.steps=6")
    known = check_data(run).catalogue
    assert known is not None
    tokens = known.train_tokens()
    found = {use.source: use for use in uses(run, tokens, phases_of(run, tokens))}
    assert sum(use.tokens_read for use in found.values()) == run.step_sizes.tokens(6) == 3 * 96 + 2 * 96 + 24 * 16
    assert sum(use.share for use in found.values()) == pytest.approx(1)
    windows = {name: (int(count) - 1) // SEQ_LENGTH for name, count in tokens.items()}
    for name, use in found.items():
        least = use.tokens_read / SEQ_LENGTH / windows[name]
        assert least <= use.epochs < least + 2 / windows[name], "at most a window is left over at each change"


def test_the_mixture_tool_says_the_length_of_a_step_and_where_a_short_sample_lies(
    in_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = [*RUN, f"data.path={in_shards}", "training.length_ramp=[{seq_length: 4, until_step: 2}]"]
    assert [answer(capsys, "step", step, *run)["seq_length"] for step in "123"] == [4, 4, 16]
    assert [span["seq_length"] for span in answer(capsys, "show", *run)["batches"]] == [4, 16]
    origin = answer(capsys, "sample", "5", *run)
    sample = build_data(small_run(in_shards, "training.length_ramp=[{seq_length: 4, until_step: 2}]")).train.sample(5)
    md5 = hashlib.md5(sample.tokens.astype("<i8").tobytes(), usedforsecurity=False).hexdigest()
    assert origin["tokens_md5"] == md5


def test_a_phase_within_a_part_of_shorter_samples_moves_all_of_it_and_one_at_its_end_nothing() -> None:
    """What training.identity refuses, and why (blend.settled_samples)."""
    first, whole = PARTS[1].first_sample, trace(samples(), np.arange(NUM_SAMPLES))
    for start, is_kept in ((first - 500, False), (first, True)):
        phases = [PHASES[0], Phase(start, {"prose": 1.0}), *PHASES[1:]]
        found = trace(samples(phases=phases), np.arange(NUM_SAMPLES))
        assert bool((found[:start] == whole[:start]).all()) is is_kept
        assert (found[start:] != whole[start:]).any()

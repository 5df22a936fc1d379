"""Synthetic samples: reproducible one by one, learnable, and with uneven masks where a test asks for them."""

import math
from collections import Counter
from itertools import pairwise

import numpy as np

from gpt4moe.data.samples import MockSamples

SMALL = MockSamples(vocab_size=64, seq_length=128, seed=1)


def test_a_sample_is_the_same_whenever_and_wherever_it_is_asked_for() -> None:
    again = MockSamples(vocab_size=64, seq_length=128, seed=1)
    later = [again.sample(n).tokens for n in (5, 3, 0)]
    assert all((SMALL.sample(n).tokens == tokens).all() for n, tokens in zip((5, 3, 0), later, strict=True))


def test_seeds_streams_and_numbers_each_give_other_samples() -> None:
    samples = [
        SMALL.sample(0),
        SMALL.sample(1),
        MockSamples(vocab_size=64, seq_length=128, seed=2).sample(0),
        MockSamples(vocab_size=64, seq_length=128, seed=1, stream="valid").sample(0),
    ]
    assert len({sample.tokens.tobytes() for sample in samples}) == 4


def test_tokens_stay_inside_any_vocabulary() -> None:
    for vocab_size in (2, 97, 100_003):
        tokens = np.concatenate(
            [MockSamples(vocab_size=vocab_size, seq_length=64, seed=3).sample(n).tokens for n in range(20)]
        )
        assert tokens.min() >= 0
        assert tokens.max() < vocab_size


def test_the_next_token_is_far_easier_given_the_last_one() -> None:
    tokens = np.concatenate([SMALL.sample(n).tokens for n in range(400)])
    pairs = Counter(zip(tokens[:-1].tolist(), tokens[1:].tolist(), strict=True))
    singles = Counter(tokens[:-1].tolist())
    total = len(tokens) - 1
    unigram = -sum(count / total * math.log(count / total) for count in singles.values())
    bigram = -sum(count / total * math.log(count / singles[first]) for (first, _), count in pairs.items())
    assert unigram < 0.95 * math.log(64)  # something for a unigram model
    assert bigram < 0.65 * unigram  # and more for one that looks back


def test_all_labels_count_unless_asked_otherwise() -> None:
    assert SMALL.sample(0).loss_mask.tolist() == [1.0] * 128


def test_masks_are_uneven_and_never_empty() -> None:
    masked = MockSamples(vocab_size=64, seq_length=128, seed=1, mask_fraction=1.0)
    sums = [int(masked.sample(n).loss_mask.sum()) for n in range(50)]
    assert min(sums) >= 1
    assert max(sums) - min(sums) > 64
    assert (masked.sample(0).tokens == SMALL.sample(0).tokens).all()


def test_validation_speaks_the_language_of_training() -> None:
    def likely(stream: str) -> dict[int, int]:
        samples = MockSamples(vocab_size=16, seq_length=512, seed=1, stream=stream)
        tokens = [samples.sample(n).tokens.tolist() for n in range(20)]
        pairs = [pair for sample in tokens for pair in pairwise(sample)]
        return {first: Counter(b for a, b in pairs if a == first).most_common(1)[0][0] for first in range(4)}

    assert likely("train") == likely("valid")

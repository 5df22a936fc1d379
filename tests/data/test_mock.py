"""Synthetic samples: reproducible one by one, learnable, and with uneven masks where a test asks for them."""

import hashlib
import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from gpt4moe.data.samples import MockSamples

SMALL = MockSamples(vocab_size=64, seq_length=128, seed=1)


def test_a_sample_is_the_same_whenever_and_wherever_it_is_asked_for() -> None:
    again = MockSamples(vocab_size=64, seq_length=128, seed=1)
    later = [again.sample(n).tokens for n in (5, 3, 0)]
    assert all((SMALL.sample(n).tokens == tokens).all() for n, tokens in zip((5, 3, 0), later, strict=True))


@pytest.mark.parametrize(
    ("vocab_size", "seq_length", "seed", "n", "md5"),
    [
        (100_003, 8192, 3, 5, "8dee4243583ce618ec623d046fe190eb"),
        (256, 300, 1234, 7, "dae800a47eb15c46514edc09bcb21f6d"),
        (2, 64, 2**70 + 5, 0, "d2fa5ae3bafe691de41b0bce6ceecc5b"),
    ],
)
def test_samples_are_those_of_the_first_release(vocab_size: int, seq_length: int, seed: int, n: int, md5: str) -> None:
    """Recorded when every successor was computed alone, in Python's whole numbers."""
    sample = MockSamples(vocab_size=vocab_size, seq_length=seq_length, seed=seed).sample(n)
    assert hashlib.md5(sample.tokens.tobytes()).hexdigest() == md5


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


def test_documents_change_no_token_and_are_a_quarter_of_a_sample_in_the_mean() -> None:
    plain, parted = SMALL, MockSamples(vocab_size=64, seq_length=128, seed=1, by_document=True)
    counts = []
    for n in range(100):
        sample = parted.sample(n)
        np.testing.assert_array_equal(sample.tokens, plain.sample(n).tokens)
        assert sample.documents is not None
        assert sample.documents[0] == 0 and set(np.diff(sample.documents)) <= {0, 1}
        np.testing.assert_array_equal(np.diff(sample.documents) == 0, sample.loss_mask[:-1] == 1)
        counts.append(1 + int(sample.documents[-1]))
    assert 4 < np.mean(counts) < 6
    assert plain.sample(0).documents is None

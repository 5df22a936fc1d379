"""Samples of a stream: each label once, labels are tokens shifted by one."""

import numpy as np
import pytest

from gpt4moe.data.batch import stack
from gpt4moe.data.samples import in_documents, num_samples, packed_sample

STREAM = np.arange(100, 123, dtype=np.uint16)


def test_every_token_but_the_first_is_predicted_once_up_to_the_last_whole_sample() -> None:
    labels = [token for i in range(num_samples(23, 4)) for token in packed_sample(STREAM, i, 4).tokens[1:]]
    assert labels == list(range(101, 121))


@pytest.mark.parametrize(("tokens", "samples"), [(0, 0), (4, 0), (5, 1), (8, 1), (9, 2)])
def test_a_sample_needs_one_token_more_than_its_length(tokens: int, samples: int) -> None:
    assert num_samples(tokens, 4) == samples


def test_a_batch_has_labels_shifted_by_one_and_counts_every_one() -> None:
    batch = stack([packed_sample(STREAM, i, 4) for i in (0, 2)], (0, 2))
    assert batch.tokens.tolist() == [[100, 101, 102, 103], [108, 109, 110, 111]]
    assert batch.labels.tolist() == [[101, 102, 103, 104], [109, 110, 111, 112]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3]] * 2
    assert batch.loss_mask.tolist() == [[1.0] * 4] * 2


def test_the_first_token_of_a_document_is_not_predicted() -> None:
    begins = np.array([False, False, True, True, False])
    sample = in_documents(packed_sample(STREAM, 1, 4), begins)
    assert sample.documents is not None and sample.documents.dtype == np.int32
    assert sample.documents.tolist() == [0, 0, 1, 2]
    assert sample.loss_mask.tolist() == [1.0, 0.0, 0.0, 1.0]
    at_both_ends = in_documents(packed_sample(STREAM, 1, 4), np.array([True, False, False, False, True]))
    assert at_both_ends.documents is not None and at_both_ends.documents.tolist() == [0] * 4
    assert at_both_ends.loss_mask.tolist() == [1.0, 1.0, 1.0, 0.0]


def test_a_sample_beyond_the_end_is_refused() -> None:
    with pytest.raises(IndexError):
        packed_sample(STREAM, 5, 4)

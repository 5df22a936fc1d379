"""Synthetic samples with images: a function of the seed and n, each image seen within its document."""

from dataclasses import replace

import numpy as np

from gpt4moe.data.loader import build_data
from gpt4moe.data.mock_images import MockImages
from gpt4moe.data.samples import MockSamples, TokenSample
from tests.data.conftest import small_run

TEXT = MockSamples(vocab_size=64, seq_length=32, seed=3, by_document=True)
IMAGES = MockImages(text=TEXT, image_size=8, max_frames=2)


def said(sample: TokenSample) -> tuple[bytes, ...]:
    assert sample.media is not None
    return (sample.tokens.tobytes(), sample.media.tobytes(), *(image.tobytes() for image in sample.images))


def test_a_sample_is_a_function_of_the_seed_and_its_number() -> None:
    assert [said(IMAGES.sample(n)) for n in range(9)] == [said(IMAGES.sample(n)) for n in range(9)]
    assert len({said(IMAGES.sample(n)) for n in range(50)}) == 50


def test_without_pixels_a_sample_is_the_same_but_for_them() -> None:
    for n in range(9):
        whole, counted = IMAGES.sample(n), IMAGES.sample(n, pixels=False)
        assert counted.images == () and said(replace(whole, images=())) == said(counted)
        assert counted.image_frames == whole.image_frames == tuple(map(len, whole.images))


def test_each_token_looks_at_the_latest_image_of_its_document_and_no_image_is_learned() -> None:
    counts = set()
    for n in range(60):
        sample = IMAGES.sample(n)
        assert sample.media is not None and sample.documents is not None
        starts = np.flatnonzero(np.diff(sample.media, prepend=0) > 0)
        places = [int(np.flatnonzero(sample.media == number)[0]) for number in range(1, len(sample.images) + 1)]
        assert starts.tolist() == places
        for number, place in enumerate(places, start=1):
            assert sample.tokens[place] == 63 and (place == 0 or sample.loss_mask[place - 1] == 0)
            assert len(set(sample.documents[sample.media == number].tolist())) == 1
            assert sample.images[number - 1].shape == (number, 8, 8, 3)
        counts.add(len(sample.images))
    assert counts == {0, 1, 2}


def test_a_vision_run_on_synthetic_data_has_images() -> None:
    run = small_run(None, "stage=vision", "+vision@model.vision=tiny", "model.vision.encoder.image_size=16")
    stream = build_data(run).train
    (batch,) = stream.micro_batches(0, global_batch_size=8, micro_batch_size=8, dp=1, dp_index=0)
    assert batch.pixels is not None and batch.pixels.shape[1:] == (3, 16, 16)

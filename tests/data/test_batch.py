"""Further tensors of a batch move and are cut over context parallelism by their own rule."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from gpt4moe.data.batch import Batch, ExtraTensor, stack
from gpt4moe.data.samples import TokenSample


def test_a_context_rank_gets_its_part_of_every_tensor_that_names_a_sequence_dimension() -> None:
    numbers = torch.arange(8).expand(2, 8)
    pixels = torch.rand(2, 8, 3)
    batch = Batch(
        tokens=numbers, labels=numbers + 1, position_ids=numbers, loss_mask=torch.ones(2, 8),
        source_index=torch.tensor([0, 1]),
        extra={
            "noise": ExtraTensor(numbers.t(), sequence_dim=0),
            "pixels": ExtraTensor(pixels),
        },
    )  # fmt: skip
    part = batch.to(torch.device("cpu")).context_slice(2, 1)  # the second of two ranks: chunks 1 and 2 of four
    assert part.tokens.tolist() == [[2, 3, 4, 5]] * 2
    assert part.extra["noise"].value.tolist() == [[place] * 2 for place in (2, 3, 4, 5)]
    assert torch.equal(part.extra["pixels"].value, pixels)
    assert part.source_index is not None and part.source_index.tolist() == [0, 1]
    assert part.token_ids is None
    assert batch.context_slice(1, 0) is batch


def sample(documents: list[int] | None) -> TokenSample:
    numbers = None if documents is None else np.array(documents, dtype=np.int32)
    return TokenSample(np.arange(7), np.ones(6, dtype=np.float32), documents=numbers)


def test_positions_begin_anew_with_every_document() -> None:
    batch = stack([sample([0, 0, 0, 1, 1, 2]), sample([0] * 6)], (0, 1))
    assert batch.documents is not None and batch.documents.dtype == torch.int64
    assert batch.documents.tolist() == [[0, 0, 0, 1, 1, 2], [0] * 6]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]]
    assert batch.token_ids is not None and batch.token_ids.tolist() == [list(range(6)), list(range(6, 12))]
    assert stack([sample(None)], (0,)).documents is None


def test_a_micro_batch_has_documents_in_all_its_samples_or_in_none() -> None:
    with pytest.raises(ValueError, match="1 of 2 samples"):
        stack([sample(None), sample([0] * 6)], (0, 1))


def pictured(media: list[int] | None, *frames: int, size: int = 4) -> TokenSample:
    """A sample with one image for each number of frames; the bytes of image n are n."""
    images = tuple(np.full((count, size, size, 3), n, dtype=np.uint8) for n, count in enumerate(frames))
    numbers = None if media is None else np.array(media, dtype=np.int32)
    return TokenSample(np.arange(7), np.ones(6, dtype=np.float32), media=numbers, image_frames=frames, images=images)


def test_images_of_all_rows_stand_one_after_the_other_and_text_counts_them_within_its_row() -> None:
    batch = stack([pictured([0, 1, 1, 2, 2, 2], 1, 3), pictured(None), pictured([1] * 6, 2)], (0, 1, 2))
    assert batch.media is not None and batch.media.tolist() == [[0, 1, 1, 2, 2, 2], [0] * 6, [1] * 6]
    assert batch.image_rows is not None and batch.image_rows.tolist() == [0, 0, 2]
    assert batch.image_frames is not None and batch.image_frames.tolist() == [1, 3, 2]
    assert batch.pixels is not None and batch.pixels.shape == (6, 3, 4, 4) and batch.pixels.dtype == torch.uint8
    assert batch.pixels[:, 0, 0, 0].tolist() == [0, 1, 1, 1, 0, 0]
    part = batch.context_slice(3, 0)  # chunks 0 and 5 of six
    assert part.media is not None and part.media.tolist() == [[0, 2], [0, 0], [1, 1]]
    assert part.pixels is batch.pixels


def test_a_micro_batch_without_images_has_none_of_their_tensors() -> None:
    batch = stack([pictured(None), pictured([0] * 6)], (0, 1))
    assert (batch.media, batch.pixels, batch.image_frames, batch.image_rows) == (None,) * 4


def test_without_pixels_a_micro_batch_counts_the_same_images() -> None:
    samples = [pictured([0, 1, 1, 2, 2, 2], 1, 3), pictured(None), pictured([1] * 6, 2)]
    whole, counted = (stack(some, (0, 1, 2)) for some in (samples, [replace(one, images=()) for one in samples]))
    assert whole.pixels is not None and counted.pixels is None
    for name in ("tokens", "media", "image_frames", "image_rows"):
        assert torch.equal(getattr(whole, name), getattr(counted, name)), name
    assert counted.to(torch.device("cpu")).pixels is None
    with pytest.raises(ValueError, match="2 of 3 images of a micro-batch have pixels"):
        stack([samples[0], samples[1], replace(samples[2], images=())], (0, 1, 2))
    with pytest.raises(ValueError, match="sample 0 of a micro-batch has pixels of other frames"):
        stack([replace(samples[0], image_frames=(1, 2))], (0,))


def test_images_must_be_those_that_the_text_counts_and_of_one_size() -> None:
    with pytest.raises(ValueError, match="sample 1 of a micro-batch has media up to 2, 1 images"):
        stack([pictured([1] * 6, 1), pictured([2] * 6, 1)], (0, 1))
    with pytest.raises(ValueError, match="several sizes"):
        stack([pictured([1] * 6, 1), pictured([1] * 6, 1, size=8)], (0, 1))

"""Micro-batches of synthetic tokens: the same set on every layout, with very uneven loss masks and some padding; of a
vision model some rows have images and clips, and some micro-batches and ranks have none."""

import dataclasses
from collections.abc import Sequence

import torch

from gpt4moe.config.run import RunConfig
from gpt4moe.config.vision import VisionConfig
from gpt4moe.data.batch import Batch, places_in_documents


def synthetic_batches(run: RunConfig, step: int, dp: int, dp_index: int, tokens: int = 0) -> list[Batch]:
    """Micro-batches of one rank at `step`; a data-parallel rank r takes r, r + dp, ... of the global batch.

    Args:
        tokens: which set of them.
    """
    generator = torch.Generator().manual_seed(1000 * (1 + tokens) + step)
    micro, sizes = run.training.micro_batch_size, run.step_sizes
    count, seq = sizes.at_step(step).global_batch_size // micro, sizes.at_step(step).seq_length
    drawn = torch.randint(0, run.model.vocab_size, (count, micro, seq + 1), generator=generator)
    # A share of each sequence from nothing to all of it.
    share = torch.rand(count, micro, 1, generator=generator) ** 2
    mask = (torch.rand(count, micro, seq, generator=generator) < share).float()
    documents = [None] * count
    if run.attends_by_document:  # a quarter of a sequence in the mean; no label is the first token of a document
        begins = torch.rand(count, micro, seq + 1, generator=generator) < 4 / seq
        documents, mask = begins[..., :-1].cumsum(dim=2) - begins[..., :1].long(), mask * ~begins[..., 1:]
    positions = torch.arange(seq).expand(micro, seq)
    first, rows = sizes.samples(step - 1), torch.arange(micro).unsqueeze(1)
    made = [
        Batch(tokens=drawn[i][:, :-1].contiguous(), labels=drawn[i][:, 1:].contiguous(), loss_mask=mask[i],
              position_ids=positions if documents[i] is None else places_in_documents(documents[i]),
              documents=documents[i], token_ids=(first + i * micro + rows) * seq + positions)
        for i in range(dp_index, count, dp)
    ]  # fmt: skip
    if run.model.vision is None:
        return made
    numbers = range(dp_index, count, dp)
    return [_pictured(batch, run.model.vision, step, i) for batch, i in zip(made, numbers, strict=True)]


def _pictured(batch: Batch, vision: VisionConfig, step: int, number: int) -> Batch:
    """Micro-batch `number` of the global batch with its images: up to two a row, the second may be a clip. Text stands
    before many a first image. A third of the micro-batches have no image; in every second step only the first has."""
    if number % 3 == 1 or (step % 2 == 0 and number > 0):
        return batch
    generator = torch.Generator().manual_seed(100_000 * step + number)
    rows, length = batch.tokens.shape
    counts = (torch.arange(rows) + number + 1) % 3  # a row has none, one or two
    if not counts.any():
        return batch
    places = torch.rand(rows, length, generator=generator).argsort(dim=1)[:, :2].sort(dim=1).values
    media, frames = torch.zeros_like(batch.tokens), []
    for row, count in enumerate(counts.tolist()):
        for image, place in enumerate(places[row, :count].tolist(), start=1):
            sees = torch.arange(length) >= place
            if batch.documents is not None:
                sees &= batch.documents[row] == batch.documents[row, place]
            media[row, place:] = torch.where(sees[place:], image, 0)
            frames.append(min(image, vision.resampler.max_frames))
    side = vision.encoder.image_size
    return dataclasses.replace(
        batch,
        media=media,
        pixels=torch.randint(0, 256, (sum(frames), 3, side, side), generator=generator, dtype=torch.uint8),
        image_frames=torch.tensor(frames),
        image_rows=torch.arange(rows).repeat_interleave(counts),
    )


# Step -> micro-batch of the global batch -> share of its sequences that is not padding. Step 1 has no padding. In
# step 2 one data-parallel rank has a little, so the others must be told. In step 3 whole shards of sequences are
# padding, and so is one micro-batch.
_ENDS = {2: {1: 15 / 16}, 3: {1: 1 / 3, 2: 0.0}}


def ended_early(batches: list[Batch], step: int, dp: int, dp_index: int) -> list[Batch]:
    """The micro-batches of synthetic_batches, some of them with padding at the end."""
    ends = _ENDS.get(step, {})
    return [_ended(batch, ends.get(dp_index + at * dp)) for at, batch in enumerate(batches)]


def _ended(batch: Batch, share: float | None) -> Batch:
    return batch if share is None else padded(batch, [int(share * batch.tokens.shape[1])] * len(batch.tokens))


def padded(batch: Batch, lengths: Sequence[int], fill: int = 0) -> Batch:
    """`batch` with padding after the first `lengths` tokens of its sequences.

    Args:
        fill: the token that stands there.
    """
    none = torch.arange(batch.tokens.shape[1]) >= torch.tensor(lengths).unsqueeze(1)
    assert batch.token_ids is not None
    return dataclasses.replace(
        batch, tokens=batch.tokens.masked_fill(none, fill), labels=batch.labels.masked_fill(none, fill),
        loss_mask=batch.loss_mask.masked_fill(none, 0.0), token_ids=batch.token_ids.masked_fill(none, -1),
    )  # fmt: skip

"""Batch: one micro-batch of a rank. Text, and further named tensors that an objective asks for."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import repeat
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpt4moe.data.mixed import StepText
from gpt4moe.data.samples import TokenSample
from gpt4moe.parallel.placement import sequence_chunks


@dataclass(frozen=True, slots=True)
class ExtraTensor:
    """A further tensor of a batch, and how context parallelism cuts it."""

    value: Tensor
    sequence_dim: int | None = None
    """The dimension of size S, which is cut over cp as tokens are. None: every context-parallel rank gets it whole."""


@dataclass(frozen=True, slots=True)
class Batch:
    """B sequences of S tokens, made on the CPU."""

    tokens: Tensor
    """[B, S] int64"""
    labels: Tensor
    """[B, S] int64: the token after each one."""
    position_ids: Tensor
    """[B, S] int64: 0 .. S-1, or, where there are `documents`, the place within the document."""
    loss_mask: Tensor
    """[B, S] float32: weight of each label in the loss."""
    token_ids: Tensor | None = None
    """[B, S] int64: the number of each token in the run (sample * S + position), from which router noise is drawn, so
    that it is the same on every layout; none comes twice, as S only rises in a run. Below 0: padding, which no router
    counts. None: no padding and no noise."""
    source_index: Tensor | None = None
    """[B] int64: which of the data's sources each sequence is of. None where losses by source are not needed."""
    documents: Tensor | None = None
    """[B, S] int64: the number of each token's document within its sequence, from 0, never falling. A token attends to
    earlier tokens of its own document alone. None: to all earlier tokens of its sequence."""
    media: Tensor | None = None
    """[B, S] int64: for each token the number, from 1 within its row, of the latest image at or before it in its own
    document; 0: there is none. None: the micro-batch has no images. With images, image_frames and image_rows are set
    too, and pixels on the rank that encodes them."""
    pixels: Tensor | None = None
    """[P, 3, height, width] uint8: every frame of every image, image after image, row after row. None: there is no
    image, or another rank encodes them."""
    image_frames: Tensor | None = None
    """[N] int64: how many frames each image has; they sum to P."""
    image_rows: Tensor | None = None
    """[N] int64: which row of the micro-batch each image is of, never falling."""
    extra: dict[str, ExtraTensor] = field(default_factory=dict)
    """Further tensors by name, for objectives that need more than text: rewards, noise. Objective.prepare adds them."""

    @property
    def samples(self) -> Tensor:
        """[B] int64: which samples of the run the whole sequences are. Below 0: the sequence is padding."""
        assert self.token_ids is not None, "sample numbers need token_ids"
        return self.token_ids[:, 0] // self.tokens.shape[1]

    def pinned(self) -> "Batch":
        """A copy in pinned memory, from which `to` does not hold up the host. Needs a GPU."""
        return self._mapped(lambda tensor, sequence_dim: tensor.pin_memory())

    def to(self, device: torch.device) -> "Batch":
        return self._mapped(lambda tensor, sequence_dim: tensor.to(device, non_blocking=True))

    def context_slice(self, cp: int, cp_index: int) -> "Batch":
        """What a context-parallel rank gets: [B, S/cp] of every [B, S], in the order of placement.sequence_chunks."""
        if cp == 1:
            return self

        def part(whole: Tensor, sequence_dim: int | None) -> Tensor:
            if sequence_dim is None:
                return whole
            chunks = whole.chunk(2 * cp, dim=sequence_dim)
            return torch.cat([chunks[chunk] for chunk in sequence_chunks(cp, cp_index)], dim=sequence_dim)

        return self._mapped(part)

    def _mapped(self, change: Callable[[Tensor, int | None], Tensor]) -> "Batch":
        """A batch of `change(tensor, its sequence dimension)` for every tensor."""
        text = {name: getattr(self, name) for name in _SEQUENCE_DIMS}
        changed = {
            name: None if tensor is None else change(tensor, _SEQUENCE_DIMS[name]) for name, tensor in text.items()
        }
        extra = {
            name: ExtraTensor(change(tensor.value, tensor.sequence_dim), tensor.sequence_dim)
            for name, tensor in self.extra.items()
        }
        return Batch(**changed, extra=extra)


_SEQUENCE_DIMS: dict[str, int | None] = {
    "tokens": 1, "labels": 1, "position_ids": 1, "loss_mask": 1, "token_ids": 1, "source_index": None, "documents": 1,
    "media": 1, "pixels": None, "image_frames": None, "image_rows": None,
}  # fmt: skip
"""Every field of a Batch but `extra` -> its dimension of size S."""


def stack(samples: list[TokenSample], numbers: Sequence[int]) -> Batch:
    """Samples of one length as a Batch.

    Args:
        numbers: which samples of the run they are.
    Raises: ValueError when some samples have documents and others have none, some have pixels and others only count
        their images, or when the images of a sample are not those that its `media` or `image_frames` count, or not of
        one size.
    """
    tokens = torch.from_numpy(np.stack([sample.tokens for sample in samples]))
    seq_length = tokens.shape[1] - 1
    places = _range(seq_length).expand(len(samples), -1)  # not in memory: nobody writes into it
    documents = _documents(samples)
    token_ids = torch.tensor(numbers).unsqueeze(1) * seq_length + places
    lengths = torch.tensor([seq_length if sample.num_tokens is None else sample.num_tokens for sample in samples])
    return Batch(
        tokens=tokens[:, :-1].contiguous(),
        labels=tokens[:, 1:].contiguous(),
        position_ids=places if documents is None else places_in_documents(documents),
        loss_mask=torch.from_numpy(np.stack([sample.loss_mask for sample in samples])),
        token_ids=token_ids.masked_fill(places >= lengths.unsqueeze(1), -1),
        source_index=torch.tensor([sample.source_index for sample in samples]),
        documents=documents,
        **_images(samples),
    )


def cut(text: StepText, numbers: NDArray[np.int64], micro_batch_size: int) -> list[Batch]:
    """The samples of a step as micro-batches, which are views of one array each.

    Args:
        numbers: [n], which samples of the run they are.
    """
    length = text.tokens.shape[1]

    def parts(array: NDArray[Any]) -> Sequence[Tensor]:
        tensors: tuple[Tensor, ...] = torch.from_numpy(array).split(micro_batch_size)
        return tensors

    def parts_if(array: NDArray[Any] | None) -> Iterable[Tensor | None]:
        return repeat(None) if array is None else parts(array)

    places = repeat(_range(length).expand(micro_batch_size, -1))
    token_ids = numbers[:, None] * length + np.arange(length)
    return [
        Batch(tokens, labels, positions, loss_mask, ids, source_index, documents)
        for tokens, labels, positions, loss_mask, ids, source_index, documents in zip(
            parts(text.tokens), parts(text.labels),
            places if text.position_ids is None else parts(text.position_ids),
            parts(text.loss_mask), parts(token_ids), parts(text.source_index), parts_if(text.documents),
            strict=False,
        )
    ]  # fmt: skip


@lru_cache(maxsize=4)
def _range(length: int) -> Tensor:
    return torch.arange(length)


def _documents(samples: list[TokenSample]) -> Tensor | None:
    found = [sample.documents for sample in samples if sample.documents is not None]
    if not found:
        return None
    if len(found) < len(samples):
        raise ValueError(f"{len(found)} of {len(samples)} samples of a micro-batch have documents")
    return torch.from_numpy(np.stack(found)).long()


def _images(samples: list[TokenSample]) -> dict[str, Tensor]:
    """The fields of a Batch that tell of images; empty where no sample has one."""
    for number, sample in enumerate(samples):
        counted, found = 0 if sample.media is None else int(sample.media.max()), len(sample.image_frames)
        if counted > found:
            raise ValueError(f"sample {number} of a micro-batch has media up to {counted}, {found} images")
        if sample.images and tuple(map(len, sample.images)) != sample.image_frames:
            raise ValueError(f"sample {number} of a micro-batch has pixels of other frames than it counts")
    frames = [(row, count) for row, sample in enumerate(samples) for count in sample.image_frames]
    if not frames:
        return {}
    nothing = np.zeros(len(samples[0].loss_mask), dtype=np.int32)
    media = [nothing if sample.media is None else sample.media for sample in samples]
    images = [image for sample in samples for image in sample.images]
    return {
        "media": torch.from_numpy(np.stack(media)).long(),
        **({"pixels": _pixels(images, len(frames))} if images else {}),
        "image_frames": torch.tensor([count for _, count in frames]),
        "image_rows": torch.tensor([row for row, _ in frames]),
    }


def _pixels(images: list[NDArray[np.uint8]], count: int) -> Tensor:
    """Batch.pixels of `count` images."""
    if len(images) < count:
        raise ValueError(f"{len(images)} of {count} images of a micro-batch have pixels")
    sizes = {image.shape[1:] for image in images}
    if len(sizes) > 1:
        raise ValueError(f"images of several sizes in a micro-batch: {sorted(sizes)}")
    return torch.from_numpy(np.concatenate(images)).permute(0, 3, 1, 2).contiguous()


def places_in_documents(documents: Tensor) -> Tensor:
    """Batch.documents -> how many tokens of its document stand before each token, [B, S] int64."""
    return torch.arange(documents.shape[1]) - torch.searchsorted(documents, documents)

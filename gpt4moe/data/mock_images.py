"""Synthetic samples with images, for stage=vision with data=mock: text of MockSamples, up to two images of noise."""

from dataclasses import dataclass, replace
from math import prod

import numpy as np
from numpy.typing import NDArray

from gpt4moe.data.permutation import derived_keys
from gpt4moe.data.samples import MockSamples, TokenSample

_MOST = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class MockImages:
    """The vocabulary's last token stands for an image, and is not learned there. A sample has none, one or two images;
    the second is a clip of two frames where clips are allowed."""

    text: MockSamples
    image_size: int
    max_frames: int

    def sample(self, n: int, *, pixels: bool = True) -> TokenSample:
        sample = self.text.sample(n)
        length, size = len(sample.loss_mask), self.image_size
        generator = np.random.Philox(key=derived_keys(2, "mock images", self.text.seed, self.text.stream, n))
        # Raw 64-bit draws, as MockSamples has them.
        count, *at = generator.random_raw(1 + _MOST).tolist()
        places = sorted({place % length for place in at[: count % (_MOST + 1)]})
        tokens, media = sample.tokens.copy(), np.zeros(length, dtype=np.int32)
        loss_mask, images = sample.loss_mask.copy(), []
        frames: list[int] = []
        for number, place in enumerate(places, start=1):
            tokens[place] = self.text.vocab_size - 1
            loss_mask[max(0, place - 1) : place] = 0
            sees = slice(place, length)
            own = np.ones(length - place, dtype=np.bool_)
            if sample.documents is not None:
                own = sample.documents[sees] == sample.documents[place]
            media[sees] = np.where(own, np.int32(number), 0)
            frames.append(min(number, self.max_frames))
            if pixels:
                shape = (frames[-1], size, size, 3)
                noise: NDArray[np.uint8] = generator.random_raw(-(-prod(shape) // 8)).astype("<u8").view(np.uint8)
                images.append(noise[: prod(shape)].reshape(shape))
        return replace(
            sample, tokens=tokens, loss_mask=loss_mask, media=media, image_frames=tuple(frames), images=tuple(images)
        )

    def origin(self, n: int, at: int) -> str:
        return self.text.origin(n, at)

    def consumed(self, n: int) -> dict[str, int]:
        return self.text.consumed(n)

"""Synthetic samples that need no files, with something to learn: a sparse Markov chain over the vocabulary.

Every token has four likely successors (probabilities 1/2, 1/4, 1/8, 1/16; the last 1/16 is any token), low numbers
being more frequent. Successors are hashes, computed when met, so a vocabulary of 100k costs nothing. Sample n comes
from a counter generator keyed by (seed, stream, n): no order in which samples are asked for matters.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gpt4moe.data.packing import Sample
from gpt4moe.data.permutation import derived_keys, mix64

# Upper ends, in 1/16, of the first four successors' probabilities.
_CUMULATIVE_SIXTEENTHS = (8, 12, 14, 15)


@dataclass(frozen=True, kw_only=True, slots=True)
class MockSamples:
    """The n-th synthetic sample. Two streams of one seed speak the same language and share no sample."""

    vocab_size: int
    seq_length: int
    seed: int
    stream: str = "train"
    mask_fraction: float = 0.0
    """Above 0, for tests: sample n hides labels by a share of its own, drawn from [0, mask_fraction]."""

    def sample(self, n: int) -> Sample:
        length = self.seq_length
        # Raw 64-bit draws: NumPy keeps bit generators stable between versions, not what is derived from them.
        raw = np.random.Philox(key=derived_keys(2, "mock", self.seed, self.stream, n)).random_raw(2 * length + 2)
        choices, wild = (raw[: length + 1] >> 60).tolist(), (raw[: length + 1] & 0xFFFFFFFF).tolist()
        tokens: NDArray[np.int64] = np.empty(length + 1, dtype=np.int64)
        token = 0
        for place in range(length + 1):
            token = self._successor(token, choices[place], wild[place])
            tokens[place] = token
        return Sample(tokens, self._mask(raw[length + 1 :] / 2.0**64))

    def consumed(self, n: int) -> dict[str, int]:
        """As a mixture answers: all of the first n samples are of the one source."""
        return {"mock": n}

    def _successor(self, token: int, sixteenth: int, wild: int) -> int:
        for rank, end in enumerate(_CUMULATIVE_SIXTEENTHS):
            if sixteenth < end:
                # The square makes low tokens frequent: a unigram model has something to learn too.
                uniform: int = mix64((self.seed << 40) + token * 4 + rank + 1 & (1 << 64) - 1) >> 32
                return (uniform * uniform * self.vocab_size) >> 64
        return (wild * self.vocab_size) >> 32

    def _mask(self, uniform: NDArray[np.float64]) -> NDArray[np.float32]:
        """[S] from S + 1 numbers in [0, 1): the first gives the share of zeros. The first label always counts."""
        mask: NDArray[np.float32] = (uniform[1:] >= uniform[0] * self.mask_fraction).astype(np.float32)
        mask[0] = 1.0
        return mask

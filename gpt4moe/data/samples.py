"""One sample of a run, before batching: cut out of a stream of tokens, or synthetic. No torch.

A stream is documents one after the other, each ended by EOS, without padding:

    stream   t0 t1 t2 t3 t4 t5 t6 t7 t8 ...      S = 4
    sample 0 [t0 t1 t2 t3 | t4]
    sample 1             [t4 t5 t6 t7 | t8]      inputs = the first S, labels = the last S: each token is predicted once
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from gpt4moe.data.permutation import derived_keys, mix64


class TokenStream(Protocol):
    """Tokens one after the other: an array, or the shards of a source."""

    def __len__(self) -> int: ...

    def __getitem__(self, stretch: slice, /) -> NDArray[np.integer]: ...


@dataclass(frozen=True, slots=True)
class TokenSample:
    """One sequence of S + 1 tokens, so that inputs and shifted labels are views of it."""

    tokens: NDArray[np.int64]
    """[S + 1]"""
    loss_mask: NDArray[np.float32]
    """[S], weight of each label in the loss."""
    source_index: int = 0
    """Its source: an index into Data.source_names."""
    documents: NDArray[np.int32] | None = None
    """[S], the number of each input's document within the sample: from 0, never falling. Attention stays inside a
    document. None: every token attends to all before it."""
    num_tokens: int | None = None
    """Inputs before the padding; None: there is none."""
    media: NDArray[np.int32] | None = None
    """[S]: for each input the number, from 1 within the sample, of the latest image at or before it in its own
    document; 0: there is none. It attends to this image alone. None: the sample has no images."""
    image_frames: tuple[int, ...] = ()
    """How many frames each of the sample's images has, in their order; a still image is one frame."""
    images: tuple[NDArray[np.uint8], ...] = ()
    """The same images, each [frames, height, width, 3] of RGB bytes, already of the encoder's size. Empty where the
    sample was asked for without pixels."""


def num_samples(num_tokens: int, seq_length: int) -> int:
    """How many samples a stream gives; fewer than seq_length + 1 tokens at its end are left out."""
    return max(0, (num_tokens - 1) // seq_length)


def packed_sample(stream: TokenStream, index: int, seq_length: int) -> TokenSample:
    """Sample `index` of a stream [num_tokens]; every label counts.

    Raises: IndexError when index is outside range(num_samples(...)).
    """
    if not 0 <= index < num_samples(len(stream), seq_length):
        raise IndexError(f"sample {index} of {num_samples(len(stream), seq_length)}")
    start = index * seq_length
    tokens = stream[start : start + seq_length + 1].astype(np.int64)
    return TokenSample(tokens, np.ones(seq_length, dtype=np.float32))


def in_documents(sample: TokenSample, begins: NDArray[np.bool_]) -> TokenSample:
    """The sample with `documents`. The label of a document's last token, which is the first token of the next
    document, counts no longer.

    Args:
        begins: [S + 1], whether each token is the first of a document.
    """
    numbers = np.cumsum(begins[:-1], dtype=np.int32) - np.int32(begins[0])
    loss_mask = np.where(begins[1:], np.float32(0), sample.loss_mask)
    return replace(sample, documents=numbers, loss_mask=loss_mask)


_NUM_SUCCESSORS = 4
_SUCCESSOR_OF_SIXTEENTH = (0,) * 8 + (1,) * 4 + (2,) * 2 + (3,)
"""A draw of 1 in 16 -> which successor follows. The last sixteenth is any token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MockSamples:
    """Synthetic samples that need no files and that a model can learn: a sparse Markov chain over the vocabulary.

    Every token has four likely successors (probabilities 1/2, 1/4, 1/8, 1/16; the last 1/16 is any token), and low
    numbers are more frequent. Successors are hashes, kept in one table for each vocabulary and seed: a vocabulary of
    100k costs 2 MB, and a sample of 8192 tokens 1 ms in place of 20 (measured).
    Sample n comes from a counter generator keyed by (seed, stream, n), so samples can be asked for in any order. Two
    streams of one seed have the same chain and share no sample.
    """

    vocab_size: int
    seq_length: int
    seed: int
    stream: str = "train"
    mask_fraction: float = 0.0
    """For tests: above 0, each sample masks a share of its labels, drawn from [0, mask_fraction]."""
    by_document: bool = False
    """Samples have documents, of a quarter of a sample's length in the mean. The tokens stay the same."""
    lengths: Sequence[tuple[int, int]] = ()
    """(first sample, length) where not all samples have seq_length (StepSizes.lengths)."""

    def sample(self, n: int, *, pixels: bool = True) -> TokenSample:
        length = next((length for first, length in reversed(self.lengths) if n >= first), self.seq_length)
        # Raw 64-bit draws: only the bit generators themselves are stable between NumPy versions.
        raw = np.random.Philox(key=derived_keys(2, "mock", self.seed, self.stream, n)).random_raw(2 * length + 2)
        choices, wild = (raw[: length + 1] >> 60).tolist(), (raw[: length + 1] & 0xFFFFFFFF).tolist()
        tokens: NDArray[np.int64] = np.empty(length + 1, dtype=np.int64)
        successors, token = _successors(self.vocab_size, self.seed), 0
        for place, sixteenth in enumerate(choices):
            if sixteenth < len(_SUCCESSOR_OF_SIXTEENTH):
                token = successors[_NUM_SUCCESSORS * token + _SUCCESSOR_OF_SIXTEENTH[sixteenth]]
            else:
                token = (wild[place] * self.vocab_size) >> 32
            tokens[place] = token
        sample = TokenSample(tokens, self._mask(raw[length + 1 :] / 2.0**64))
        if not self.by_document:
            return sample
        # Bits that neither choices nor wild tokens use.
        return in_documents(sample, (raw[: length + 1] >> 32 & 0xFFFFFFF) * max(1, length // 4) < 1 << 28)

    def origin(self, n: int, at: int) -> str:
        return "synthetic"

    def consumed(self, n: int) -> dict[str, int]:
        """Samples of each source among the first n: there is one source."""
        return {"mock": n}

    def _mask(self, uniform: NDArray[np.float64]) -> NDArray[np.float32]:
        """[S], from S + 1 numbers in [0, 1): the first gives the share of zeros. The first label always counts."""
        mask: NDArray[np.float32] = (uniform[1:] >= uniform[0] * self.mask_fraction).astype(np.float32)
        mask[0] = 1.0
        return mask


@lru_cache(maxsize=4)
def _successors(vocab_size: int, seed: int) -> "array[int]":
    """Of each token its likely successors, [vocab_size * _NUM_SUCCESSORS] int32."""
    first = np.uint64((seed << 40) + 1 & (1 << 64) - 1)
    uniform = mix64(np.arange(vocab_size * _NUM_SUCCESSORS, dtype=np.uint64) + first) >> np.uint64(32)
    # The square makes low tokens frequent, so that a unigram model learns something too. It is a fraction of 2^64;
    # times the vocabulary it would need more than 64 bits, so its halves are multiplied one by one.
    square, half = uniform * uniform, np.uint64(32)
    low = (square & np.uint64(0xFFFFFFFF)) * np.uint64(vocab_size) >> half
    chosen = ((square >> half) * np.uint64(vocab_size) + low) >> half
    return array("i", chosen.astype(np.int32).tobytes())

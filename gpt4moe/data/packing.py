"""Samples cut out of one long token stream: documents one after the other, each ended by EOS, no padding.

stream   t0 t1 t2 t3 t4 t5 t6 t7 t8 ...          S = 4
sample 0 [t0 t1 t2 t3 | t4]
sample 1             [t4 t5 t6 t7 | t8]          tokens = first S, labels = last S: every token is predicted once
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Sample:
    """One sequence before batching. S + 1 tokens, so that inputs and shifted labels are views of it."""

    tokens: NDArray[np.int64]
    """[S + 1]"""
    loss_mask: NDArray[np.float32]
    """[S], of the label at each place."""
    source_index: int = 0
    """Which of the data's sources it is of (Data.source_names)."""


def num_samples(num_tokens: int, seq_length: int) -> int:
    """Samples of a stream; a last stretch shorter than seq_length + 1 tokens is left out."""
    return max(0, (num_tokens - 1) // seq_length)


def packed_sample(stream: NDArray[np.integer], index: int, seq_length: int) -> Sample:
    """Sample `index` of a stream [num_tokens]: every label counts.

    Raises: IndexError when index is outside range(num_samples(...)).
    """
    if not 0 <= index < num_samples(len(stream), seq_length):
        raise IndexError(f"sample {index} of {num_samples(len(stream), seq_length)}")
    start = index * seq_length
    tokens = stream[start : start + seq_length + 1].astype(np.int64)
    return Sample(tokens, np.ones(seq_length, dtype=np.float32))

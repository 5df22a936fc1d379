"""Is this language, and does the tokenizer know it? Refused where the numbers say no.

Elsewhere a corpus of 99% <unk> trained for 17 hours before anyone looked.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gpt4moe.data.tokenizer import Tokenizer
from gpt4moe.errors import DataError

MOST_UNKNOWN = 0.01
"""Share of tokens that are <unk>."""
LEAST_ENTROPY = 2.0
"""Bits a token. Prose and code have 8 to 11 with vocabularies of thousands, 4.5 to 5 with one of single bytes."""
MOST_LOST = 0.01
"""Share of a sample's characters that decoding its tokens does not give back."""
_ENOUGH = 1000
"""Tokens below which the entropy says nothing."""
STRIDE = 16
"""The entropy is that of every 16th token of a batch: counting them all takes a tenth of the time of tokenizing."""


@dataclass(frozen=True, slots=True)
class Quality:
    """Of a source's tokens without EOS."""

    tokens: int
    unknown: int
    counts: NDArray[np.int64]
    """[V], of every 16th token."""

    @property
    def unknown_share(self) -> float:
        return self.unknown / self.tokens if self.tokens else 0.0

    @property
    def entropy_bits(self) -> float:
        """Of the distribution of single tokens."""
        total = int(self.counts.sum())
        share = self.counts[self.counts > 0] / max(1, total)
        return float(-(share * np.log2(share)).sum()) + 0.0


def require_language(name: str, quality: Quality) -> None:
    """Raises: DataError for a source that is mostly <unk>, or repeats a few tokens."""
    accept = "If it is meant: --accept-nonsense."
    if quality.unknown_share > MOST_UNKNOWN:
        raise DataError(
            f"Source {name}: {quality.unknown_share:.1%} of {quality.tokens:,} tokens are <unk>, more than "
            f"{MOST_UNKNOWN:.0%}: the tokenizer does not know this text.",
            f"Take a tokenizer trained on such text, or a byte-level one (--train-tokenizer). {accept}",
        )
    if quality.counts.sum() >= _ENOUGH and quality.entropy_bits < LEAST_ENTROPY:
        raise DataError(
            f"Source {name}: its tokens have {quality.entropy_bits:.2f} bits of unigram entropy, below "
            f"{LEAST_ENTROPY:.1f}; prose has 8 to 11.",
            f"Look at its documents: a few tokens fill them. {accept}",
        )


def require_decodable(name: str, tokenizer: Tokenizer, sample: Sequence[str], ids: Sequence[list[int]]) -> None:
    """
    Args:
        ids: that the tokenizer gives for the sample.
    Raises: DataError for a tokenizer that silently drops characters: one without <unk> and without all bytes.
    """
    given = sum(len("".join(text.split())) for text in sample)
    back = sum(len("".join(tokenizer.decode(tokens).split())) for tokens in ids)
    if given and 1 - back / given > MOST_LOST:
        raise DataError(
            f"Source {name}: of {given:,} characters of a sample, decoding its tokens gives back {back:,}: the "
            "tokenizer drops what it does not know.",
            "Take a byte-level tokenizer (--train-tokenizer makes one). If it is meant: --accept-nonsense.",
        )

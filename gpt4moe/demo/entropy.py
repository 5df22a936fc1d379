"""Entropies of a data folder's held-out text under two counting models; a trained model has to get below them.

Both are cross-entropies, in nats per token, of the held-out tokens under counts of all training tokens:

    unigram   add-one smoothing
    bigram    interpolated Kneser-Ney (Chen and Goodman, 1998): absolute discount D = n1 / (n1 + 2 n2) of the pairs
              seen once and twice, the rest given to how many different tokens a token follows (add-one)

Counts pool every source with a share; the shares weigh the sources' held-out means, as the validation stream does.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from gpt4moe.data.catalogue import Catalogue
from gpt4moe.data.manifest import write_json
from gpt4moe.data.mixture import Phase

_CACHE_NAME = "entropies.json"


@dataclass(frozen=True, slots=True)
class Entropies:
    """Nats per held-out token."""

    unigram: float
    bigram: float


@dataclass(frozen=True, slots=True)
class _Counts:
    """Of adjacent training tokens. P distinct pairs, V tokens."""

    unigram: NDArray[np.int64]
    """[V]"""
    pairs: NDArray[np.int64]
    """[P] distinct, ascending: first * V + second."""
    pair_counts: NDArray[np.int64]
    """[P]"""


def corpus_entropies(catalogue: Catalogue, phases: Sequence[Phase]) -> Entropies:
    """Entropies of the folder's held-out text; computed once for these shares, then read from entropies.json.

    Args:
        phases: of the run; the first one's shares count, as for its validation.
    Raises: DataError as Catalogue.open.
    """
    shares = phases[0].shares
    key = {"tokens": catalogue.content_hash(phases[:1])}
    cache = catalogue.folders[0] / _CACHE_NAME
    if cache.is_file():
        kept = json.loads(cache.read_text())
        if kept["key"] == key:
            return Entropies(**kept["nats_per_token"])
    train = [catalogue.sources[name].tokens("train")[:] for name in shares]
    counts = _count(train, catalogue.vocabulary.vocab_size)
    unigram = bigram = 0.0
    for name, share in shares.items():
        held_out = catalogue.sources[name].tokens("valid")[:].astype(np.int64)
        unigram += share * unigram_cross_entropy(held_out, counts)
        bigram += share * bigram_cross_entropy(held_out, counts)
    entropies = Entropies(unigram, bigram)
    write_json(cache, {"key": key, "nats_per_token": asdict(entropies)})
    return entropies


def unigram_cross_entropy(tokens: NDArray[np.int64], counts: _Counts) -> float:
    """Mean nats of every token but the first, which no model predicts."""
    smoothed = counts.unigram + 1
    return float(-np.log(smoothed[tokens[1:]] / smoothed.sum()).mean())


def bigram_cross_entropy(tokens: NDArray[np.int64], counts: _Counts) -> float:
    """Mean nats of every token but the first, given the one before."""
    vocab_size = len(counts.unigram)
    once, twice = np.count_nonzero(counts.pair_counts == 1), np.count_nonzero(counts.pair_counts == 2)
    discount = once / (once + 2 * twice) if once else 0.5
    first, second = np.divmod(counts.pairs, vocab_size)
    context_total = np.bincount(first, weights=counts.pair_counts, minlength=vocab_size)
    context_types = np.bincount(first, minlength=vocab_size)
    continuation = np.bincount(second, minlength=vocab_size) + 1
    lower = continuation / continuation.sum()

    context, target = tokens[:-1], tokens[1:]
    wanted = context * vocab_size + target
    place = np.minimum(np.searchsorted(counts.pairs, wanted), len(counts.pairs) - 1)
    seen = np.where(counts.pairs[place] == wanted, counts.pair_counts[place] - discount, 0.0)
    total = np.maximum(context_total[context], 1)
    # A context never seen gives everything to the lower order.
    left_over = np.where(context_total[context] > 0, discount * context_types[context] / total, 1.0)
    return float(-np.log(seen / total + left_over * lower[target]).mean())


def _count(streams: list[NDArray[np.integer]], vocab_size: int) -> _Counts:
    unigram: NDArray[np.int64] = np.zeros(vocab_size, dtype=np.int64)
    pairs = []
    for stream in streams:
        tokens = stream.astype(np.int64)
        unigram += np.bincount(tokens, minlength=vocab_size)
        pairs.append(tokens[:-1] * vocab_size + tokens[1:])
    distinct, pair_counts = np.unique(np.concatenate(pairs), return_counts=True)
    return _Counts(unigram, distinct, pair_counts)

"""Loss, perplexity and bits per byte of each source of a data folder (its validation part) or of jsonl documents.

data folder   documents one after the other, as in training; the windows are the samples of training's validation.
              Of a source with images each document by itself, with its images (interleaved.py)
jsonl         {"text": ..., "source": ... (or the file's name)}; each document alone, after an end token
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gpt4moe.data.catalogue import Catalogue, Source
from gpt4moe.data.image_rows import ImageView
from gpt4moe.data.lines import read_lines
from gpt4moe.errors import DataError
from gpt4moe.evaluation.interleaved import document_pieces, text_parts
from gpt4moe.evaluation.pieces import Piece, encode_text, first_token, windows
from gpt4moe.inference.text import Words

if TYPE_CHECKING:  # it imports DeepSpeed, which looks for an accelerator then (inference.load.placed)
    from gpt4moe.evaluation.scoring import Scorer

_READ_TOKENS = 1 << 20
"""Of a data folder at a time, to find its documents."""
ROUND_TOKENS = 1 << 20
"""Scored tokens between two meetings of all ranks: what a rank keeps in memory."""


@dataclass(frozen=True, slots=True)
class SourceText:
    """One source, cut into pieces."""

    name: str
    pieces: list[Piece]
    num_bytes: int
    """UTF-8 bytes of the scored tokens; an end token has none."""
    image_id: int | None = None
    """Of a source with images: the token that stands for one. It is no label, so it is not scored."""


@dataclass(frozen=True, slots=True)
class Part:
    """What is scored between two meetings of all ranks: the same on every layout."""

    source: str
    pieces: Sequence[Piece]
    image_id: int | None = None
    """SourceText.image_id."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceResult:
    """What the model makes of one source."""

    source: str
    tokens: int
    """Scored."""
    bytes: int
    nats: float
    """Sum of -log(probability) over all tokens."""
    right: int
    """Tokens that are the most probable one at their place."""

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.nats / self.tokens

    def facts(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "source": self.source, "tokens": self.tokens, "bytes": self.bytes, "loss": self.loss,
            "perplexity": math.exp(self.loss), "bits_per_byte": self.nats / math.log(2) / max(self.bytes, 1),
            "right_tokens": self.right,
        }  # fmt: skip


def read_sources(
    path: Path, words: Words, *, max_tokens: int | None, view: ImageView | None = None
) -> list[SourceText]:
    """The sources of a data folder or a jsonl file.

    Args:
        max_tokens: about so many scored tokens of each source, from its beginning; None: all.
        view: of the model's images (interleaved.view_of); None: a source with images is refused.
    Raises: DataError when it is neither, empty, damaged, or of another vocabulary than the model's.
    """
    return _of_folder(path, words, max_tokens, view) if path.is_dir() else _of_lines(path, words, max_tokens)


def parts(sources: Sequence[SourceText]) -> list[Part]:
    """All sources, in their order, ROUND_TOKENS at a time."""
    found = []
    for source in sources:
        start = size = 0
        for at, piece in enumerate(source.pieces, start=1):
            size += piece.num_scored
            if size >= ROUND_TOKENS or at == len(source.pieces):
                found.append(Part(source.name, source.pieces[start:at], source.image_id))
                start, size = at, 0
    return found


def score_part(scorer: "Scorer", part: Part) -> dict[str, Any]:
    """For JSON, and for `summed`; on every rank. Collective over the world."""
    counted = [
        score if part.image_id is None else score.of(np.asarray(piece.tokens[-piece.num_scored :]) != part.image_id)
        for piece, score in zip(part.pieces, scorer.score(part.pieces), strict=True)
    ]
    return {
        "id": part.source, "kind": "source", "tokens": sum(len(score.logprobs) for score in counted),
        "nats": -math.fsum(score.total for score in counted),
        "right_tokens": sum(int(score.is_greedy.sum()) for score in counted),
    }  # fmt: skip


def summed(sources: Sequence[SourceText], lines: Sequence[dict[str, Any]]) -> list[SourceResult]:
    """Results of sources from what score_part gave for all of their parts; with a total where there are several."""
    found = []
    for source in sources:
        own = [line for line in lines if line["id"] == source.name]
        found.append(
            SourceResult(
                source=source.name, tokens=sum(line["tokens"] for line in own), bytes=source.num_bytes,
                nats=math.fsum(line["nats"] for line in own), right=sum(line["right_tokens"] for line in own),
            )
        )  # fmt: skip
    if len(found) > 1:
        sums = {name: sum(getattr(one, name) for one in found) for name in ("tokens", "bytes", "right")}
        found.append(SourceResult(source="all", nats=math.fsum(one.nats for one in found), **sums))
    return found


def _of_folder(folder: Path, words: Words, max_tokens: int | None, view: ImageView | None) -> list[SourceText]:
    catalogue = Catalogue.open([folder])
    catalogue.require_whole()
    vocabulary = catalogue.vocabulary
    if vocabulary.vocab_size != words.vocab_size:
        raise DataError(
            f"The data of {folder} has a vocabulary of {vocabulary.vocab_size}, the model one of {words.vocab_size}.",
            "Make data with the model's tokenizer (tools/tokenize_corpus.py), or give a jsonl file of texts.",
        )
    found = []
    for name, source in catalogue.sources.items():
        if source.manifest.images is not None:
            found.append(_interleaved(source, words, view, max_tokens, vocabulary.eos_id))
            continue
        tokens = source.tokens("valid")[: None if max_tokens is None else max_tokens + 1]
        _require_known(source, tokens, words.vocab_size)
        if len(tokens) < 2:
            raise DataError(f"Source {name} of {folder} has {len(tokens)} validation tokens.", "Give more text.")
        scored = _bytes(words, _documents(tokens[1:], vocabulary.eos_id))
        found.append(SourceText(name, list(windows(tokens, words.context_length)), scored))
    return found


def _interleaved(
    source: Source, words: Words, view: ImageView | None, max_tokens: int | None, end: int
) -> SourceText:  # fmt: skip
    if view is None:
        raise DataError(
            f"Source {source.name} of {source.folder.parent} has documents with images, and text is all that is read "
            "here.",
            "Give a folder of text sources or a jsonl file of texts, or evaluate a vision model with "
            "tools/evaluate.py.",
        )
    _require_known(source, source.tokens("valid")[:], words.vocab_size)
    assert source.manifest.images is not None
    image_id = source.manifest.images.image_id
    pieces = document_pieces(source, view, words.context_length, max_tokens)
    num_bytes = 0
    for piece in pieces:
        scored = np.asarray(piece.tokens[1:])
        for part in text_parts(scored[scored != end], image_id):
            num_bytes += len(words.decode(part).encode())
    return SourceText(source.name, pieces, num_bytes, image_id)


def _require_known(source: Source, tokens: NDArray[np.integer], vocab_size: int) -> None:
    """tokens: the first of its validation part. Raises: DataError for one that the model lacks."""
    if len(tokens) and tokens.max() >= vocab_size:
        at = int(np.argmax(tokens))
        raise DataError(
            f"Source {source.name} has the token {tokens[at]}, but the vocabulary has {vocab_size}: "
            f"{source.tokens('valid').origin(at)}.",
            "Verify the data folder (tools/mixture.py verify FOLDER), and make the source again.",
        )


def _documents(tokens: NDArray[np.integer], end: int) -> Iterator[list[int]]:
    """One at a time: a list of all tokens would take ten times the memory of the array."""
    start = 0
    for begin in range(0, len(tokens), _READ_TOKENS):
        for at in np.flatnonzero(tokens[begin : begin + _READ_TOKENS] == end).tolist():
            yield tokens[start : begin + at].tolist()
            start = begin + at + 1
    yield tokens[start:].tolist()


def _bytes(words: Words, documents: Iterable[list[int]]) -> int:
    return sum(len(words.decode(document, is_whole=True).encode()) for document in documents)


def _of_lines(path: Path, words: Words, max_tokens: int | None) -> list[SourceText]:
    texts: dict[str, list[str]] = {}
    for line in read_lines(path, {"text": str, "source": str}, needed=("text",), example='{"text": "..."}'):
        if line["text"]:
            texts.setdefault(line.get("source", path.stem), []).append(line["text"])
    if not texts:
        raise DataError(f"{path} has no text.", 'Give lines {"text": "..."}.')
    return [_documents_of(name, some, words, max_tokens) for name, some in texts.items()]


def _documents_of(name: str, texts: Sequence[str], words: Words, max_tokens: int | None) -> SourceText:
    before = first_token(words)
    pieces: list[Piece] = []
    num_bytes = num_tokens = 0
    for text in texts:
        if max_tokens is not None and num_tokens >= max_tokens:
            break
        tokens = encode_text(words, text)
        pieces += windows([before, *tokens], words.context_length)
        num_tokens += len(tokens)
        num_bytes += len(text.encode())
    return SourceText(name, pieces, num_bytes)

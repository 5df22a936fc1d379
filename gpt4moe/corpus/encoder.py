"""The one seam to the libraries that tokenize: `gigatoken` where a sample proves equal ids, `tokenizers` where not.

A special token's name in a text is text. gigatoken would take it for the token, so it gets the tokenizer without them.
"""

import json
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpt4moe.data.tokenizer import Tokenizer, load_tokenizer

HARD = (
    "", " ", "\n", "\r\n\t  x  \n\n\n", "a\u00a0b\u2003c", "e\u0301 \u00e9 \u212b \ufb01",
    "\U0001f469\u200d\U0001f4bb\U0001f1e9\U0001f1ea", "\u4f60\u597d\uff0c\u4e16\u754c",
    "\u0645\u0631\u062d\u0628\u0627 \u05e9\u05dc\u05d5\u05dd", "don't WE'LL I'm 's'S", "1234567 3.14 x1y2",
    "\x00\x01\x7f\ufeff\ufffd", "def f(x):\n\treturn  x**2  # \u00fcber\n", "a" * 300, " " * 65 + "x",
    "\u0130\u0131\u1e9e\u00df", "https://a.b/c?d=e&f=%20",
)  # fmt: skip
"""Texts in which two splits into words have differed elsewhere; compared beside the sample."""


class Encoder:
    """Token ids of documents.

    Args:
        path: a tokenizer.json.
        library: "gigatoken" or "tokenizers".
    """

    def __init__(self, path: Path, library: str):
        self.tokenizer = open_tokenizer(path)
        self.library = library
        self._fast: Any = _gigatoken(path.read_text(encoding="utf-8")) if library == "gigatoken" else None

    def encode(self, documents: Sequence[bytes]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """
        Args:
            documents: UTF-8.
        Returns: ids of all documents one after the other, and where each ends.
        """
        if self._fast is None:
            return _joined(self.tokenizer.encode_batch([document.decode() for document in documents]))
        layout = self._fast.encode_batch(documents, parallel=False).layout
        offsets = np.asarray(layout.offsets.data)
        return np.asarray(layout.content.data)[offsets[0] : offsets[-1]], offsets[1:] - offsets[0]

    def agrees(self, documents: Sequence[bytes], expected: Sequence[Sequence[int]] | None = None) -> bool:
        """Whether `tokenizers` gives the same ids.

        Args:
            expected: what it gives, where that is known.
        """
        ids, ends = self.encode(documents)
        if expected is None:
            expected = self.tokenizer.encode_batch([document.decode() for document in documents])
        others, other_ends = _joined(expected)
        return np.array_equal(ids, others) and np.array_equal(ends, other_ends)


def choose_library(
    path: Path, sample: Sequence[bytes], expected: Sequence[Sequence[int]] | None = None
) -> tuple[str, str]:
    """
    Args:
        sample: documents of the corpus.
        expected: the ids that `tokenizers` gives for them, where they are known.
    Returns: the library to use, and why.
    """
    if find_spec("gigatoken") is None:
        return "tokenizers", "gigatoken, which is faster, is not installed (requirements.txt)"
    try:
        fast = Encoder(path, "gigatoken")
        special = [f"a{token.content}b {token.content}" for token in _special(fast.tokenizer)]
        is_equal = fast.agrees(sample, expected) and fast.agrees([text.encode() for text in (*HARD, *special)])
    except (ValueError, RuntimeError, NotImplementedError, KeyError, TypeError) as error:
        return "tokenizers", f"gigatoken does not take this tokenizer ({' '.join(str(error).split())[:200]})"
    size = sum(map(len, sample))
    if not is_equal:
        return "tokenizers", f"gigatoken gives other ids for a sample of {size:,} bytes"
    return "gigatoken", f"its ids equal those of tokenizers for a sample of {len(sample):,} documents, {size:,} bytes"


def open_tokenizer(path: Path) -> Tokenizer:
    """As load_tokenizer; a file that has not changed is read once, for that takes a percent of the time of 400 MB."""
    found = path.stat() if path.is_file() else None
    return _opened(path, (found.st_mtime_ns, found.st_size, found.st_ino) if found is not None else None)


@lru_cache(maxsize=1)
def _opened(path: Path, state: tuple[int, int, int] | None) -> Tokenizer:
    return load_tokenizer(path)


def unknown_id(tokenizer: Tokenizer) -> int | None:
    """The id that stands for what the vocabulary lacks; None where it lacks nothing, or the library drops it."""
    model = tokenizer.backend.model
    token = getattr(model, "unk_token", None)
    if token is not None:
        found: int | None = tokenizer.backend.token_to_id(token)
        return found
    for name in ("<unk>", "[UNK]", "<UNK>"):
        if (found := tokenizer.backend.token_to_id(name)) is not None:
            return found
    return None


def _special(tokenizer: Tokenizer) -> list[Any]:
    return [token for token in tokenizer.backend.get_added_tokens_decoder().values() if token.special]


@lru_cache(maxsize=1)
def _gigatoken(text: str) -> Any:
    """
    Args:
        text: a tokenizer.json. Its special tokens become entries of the vocabulary that no text becomes.
    """
    import gigatoken

    content = json.loads(text)
    content["added_tokens"] = [token for token in content.get("added_tokens", ()) if not token["special"]]
    content["post_processor"] = None
    return gigatoken.Tokenizer.from_json(json.dumps(content))


def _joined(rows: Sequence[Sequence[int]]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    ids = np.fromiter(chain.from_iterable(rows), dtype=np.uint32)
    return ids, np.cumsum([len(row) for row in rows], dtype=np.int64)

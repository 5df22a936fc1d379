"""Texts as pieces that fit the context: long texts in windows, questions with their answers.

The rules are those of lm-evaluation-harness (lm_eval.utils.get_rolling_token_windows, TemplateLM._encode_pair), so that
our numbers and its numbers are the same.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from gpt4moe.errors import DataError
from gpt4moe.inference.pictures import Picture
from gpt4moe.inference.text import Words


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens whose last `num_scored` are scored, each after all before it in the piece."""

    tokens: Any
    """Whole numbers: a list, or a part of a token file. At least num_scored + 1, at most the context + 1."""
    num_scored: int
    """At least 1."""
    images: Sequence[Picture] = ()
    """That its tokens see, in the order of their places in it."""


def encode_text(words: Words, text: str, *, has_special: bool = False) -> list[int]:
    """Tokens of a text of any length.

    Args:
        has_special: special tokens in the text are meant as such; otherwise they are plain text.
    Raises: DataError when it has a token that the model lacks.
    """
    words.backend.encode_special_tokens = not has_special
    tokens = list(words.backend.encode(text, add_special_tokens=False).ids)
    if tokens and max(tokens) >= words.vocab_size:
        shown = text if len(text) <= 40 else f"{text[:37]}..."
        raise DataError(
            f"The text {shown!r} has token {max(tokens)}, but model.vocab_size={words.vocab_size}.",
            "Use the tokenizer that the model was trained with.",
        )
    return tokens


def first_token(words: Words) -> int:
    """What stands before a text that begins: the token that begins texts, else one that ends them.

    Raises: DataError when the model has neither.
    """
    name = dict(words.special).get("bos_token")
    found = words.backend.token_to_id(name) if name else None
    if found is not None:
        return int(found)
    if not words.end_ids:
        raise DataError(
            "The model has no token that begins or ends texts, so nothing stands before a text's first token.",
            "Use a folder with a tokenizer that has one, or evaluate on a data folder.",
        )
    return min(words.end_ids)


def windows(tokens: Any, context_length: int) -> Iterator[Piece]:
    """Pieces that together score every token but the first, each once.

    All have context_length + 1 tokens, and each but the last scores all but its first. The last one scores what is
    left, after as much of the text as fits. Without it they are the samples of validation while training.
    """
    scored = 1
    while scored < len(tokens):
        end = min(scored + context_length, len(tokens))
        yield Piece(tokens[max(0, end - context_length - 1) : end], end - scored)
        scored = end


def encode_pair(encode: Callable[[str], list[int]], prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """(tokens of the prompt, tokens of the answer): those of the whole text, cut behind the prompt's.

    Spaces at the prompt's end count as the answer's: most tokenizers join a space and the word after it.
    """
    bare = prompt.rstrip()
    whole, before = encode(prompt + answer), encode(bare)
    return before, whole[len(before) :]


def answer_piece(before: Sequence[int], answer: Sequence[int], context_length: int) -> Piece:
    """Scores an answer after what stands before it; too long, the beginning is left out."""
    tokens = [*before, *answer][-(context_length + 1) :]
    return Piece(tokens, min(len(answer), len(tokens) - 1))

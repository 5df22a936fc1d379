"""A conversation as tokens, and which of them are learned: what the assistant says, its end token included."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import processors

from gpt4moe.chat.rows import Conversation
from gpt4moe.chat.template import Span
from gpt4moe.chat.words import ChatWords
from gpt4moe.errors import DataError


@dataclass(frozen=True, slots=True)
class Encoded:
    """One conversation."""

    tokens: NDArray[np.int64]
    mask: NDArray[np.bool_]
    """Of each token, whether it is learned."""


class Encoder:
    """Conversations of one tokenizer and template."""

    def __init__(self, words: ChatWords):
        self.words = words
        self.backend = tokenizers.Tokenizer.from_str(words.backend.to_str())
        # Places with a token's own blanks: some tokenizers tell them without.
        self.backend.post_processor = processors.ByteLevel(trim_offsets=False)
        added = words.backend.get_added_tokens_decoder()
        special = {number: token.content for number, token in added.items() if token.special}
        special[words.eos_id] = str(words.backend.id_to_token(words.eos_id))  # also where its file says it is none
        self.ends = frozenset(special)
        """Tokens that may end a turn."""
        self.special = list(special.values())
        self.learned_ends: set[int] = set()
        """Of `ends`, those that end a turn that was learned."""

    def encode(self, conversation: Conversation, where: str) -> Encoded:
        """Raises: DataError for a content with a special token's text, a template whose assistant's parts cannot be
        found or have no end token, and a token that reaches over the border of one."""
        self._require_plain(conversation, where)
        text, spans = self.words.template.spans(conversation.messages, conversation.tools, where)
        encoding = self.backend.encode(text, add_special_tokens=False)
        tokens: NDArray[np.int64] = np.array(encoding.ids, dtype=np.int64)
        places = _places(encoding, spans, where)
        mask: NDArray[np.bool_] = np.zeros(len(tokens), dtype=np.bool_)
        for (first, last), span, is_learned in zip(places, spans, conversation.learned, strict=True):
            ends = [at for at in range(first, last) if tokens[at] in self.ends]
            behind = text[encoding.offsets[ends[-1]][1] : span[1]] if ends else "?"
            if behind.strip():
                raise DataError(
                    f"{where}: no end token stands at the end of the assistant's part {text[slice(*span)][-40:]!r}: a "
                    "model that learns it would not stop there.",
                    "Let the chat template end the assistant's turn with a special token of the tokenizer, within "
                    "{% generation %}.",
                )
            if is_learned:
                self.learned_ends.add(int(tokens[ends[-1]]))
            # Rendered turn by turn, a part has what stands between turns too: a line break that nobody would say.
            mask[first : last if self.words.template.has_blocks else ends[-1] + 1] = is_learned
        if not mask[1:].any():
            raise DataError(f"{where} has no token to learn.", "Leave the line out, or --bad-rows skip.")
        return Encoded(tokens, mask)

    def _require_plain(self, conversation: Conversation, where: str) -> None:
        named = {f"message {number}: its content": message for number, message in enumerate(conversation.messages)}
        for name, value in (named | {"tools": conversation.tools}).items():
            for text in _texts(value):
                found = next((special for special in self.special if special in text), None)
                if found:
                    raise DataError(
                        f"{where}, {name} has {found}, which would be read as the token.",
                        "Write it in another way, or --bad-rows skip.",
                    )


def _texts(value: object) -> Iterator[str]:
    """All texts in a JSON value, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for pair in value.items():
            yield from _texts(list(pair))
    elif isinstance(value, list):
        for one in value:
            yield from _texts(one)


def _places(encoding: tokenizers.Encoding, spans: Sequence[Span], where: str) -> list[Span]:
    """The tokens of each span. Raises: DataError when a token is half inside."""
    offsets: NDArray[np.int64] = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
    found = []
    for start, end in spans:
        inside = (offsets[:, 0] < end) & (offsets[:, 1] > start)
        half = inside & ((offsets[:, 0] < start) | (offsets[:, 1] > end))
        if half.any():
            at = int(np.flatnonzero(half)[0])
            raise DataError(
                f"{where}: the token {encoding.tokens[at]!r} is half the assistant's and half not.",
                "Begin and end the answer without blanks, let the template write a special token before and behind it, "
                "or --bad-rows skip.",
            )
        at_inside = np.flatnonzero(inside)
        found.append((int(at_inside[0]), int(at_inside[-1]) + 1) if at_inside.size else (0, 0))
    return found

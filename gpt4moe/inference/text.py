"""A folder's words: its tokenizer, the tokens that end a text, its context, its chat template. No torch.

run or step folder     the run's tokenizer; the files that from-hf kept, where the checkpoint was converted
Hugging Face folder    tokenizer.json, generation_config.json, chat_template.jinja
to-inference folder    the run's tokenizer
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers

from gpt4moe.chat.template import ChatTemplate
from gpt4moe.chat.words import TOKENIZER_FOLDER, read_json, special_texts, template_of
from gpt4moe.config.checksums import SUMS, changed_files
from gpt4moe.config.run import RunConfig
from gpt4moe.data.check import tokenizer_path
from gpt4moe.data.tokenizer import eos_of, load_backend
from gpt4moe.errors import ConfigError, DataError

_BYTES_OF_CHARACTER = 4
"""At most, in UTF-8; a token may be one of them."""
_CURE = "Use a folder with a tokenizer, or set data.tokenizer when training on synthetic tokens."


@dataclass(frozen=True, kw_only=True, slots=True)
class Words:
    """Text <-> token ids of one model."""

    backend: tokenizers.Tokenizer
    end_ids: frozenset[int]
    """Tokens that end a text."""
    vocab_size: int
    """Of the model; the tokenizer may have fewer."""
    context_length: int
    """Tokens of a prompt and what follows it, at most."""
    chat_template: str | None = None
    """jinja, with the names that transformers' apply_chat_template has; chat.template renders it."""
    special: tuple[tuple[str, str], ...] = ()
    """Names and texts of special tokens that a template may use: bos_token, eos_token, ..."""

    plain: tokenizers.Tokenizer = field(init=False, repr=False, compare=False)
    """The backend for prompts. Two of them: a setting that changed under another thread's feet would be an error."""
    before: list[int] = field(init=False, repr=False, compare=False)
    """Tokens of a text that stands before what is decoded."""
    most_letters: int = field(init=False, repr=False, compare=False)
    """Of a token's text; a word that is not known may be one token."""

    def __post_init__(self) -> None:
        plain = tokenizers.Tokenizer.from_str(self.backend.to_str())
        plain.encode_special_tokens = True
        for name, value in [
            ("plain", plain), ("before", plain.encode("a", add_special_tokens=False).ids),
            ("most_letters", max(64, *map(len, plain.get_vocab()), 0)),
        ]:  # fmt: skip
            object.__setattr__(self, name, value)

    def encode(self, text: str, *, is_chat: bool = False, what: str = "The prompt") -> list[int]:
        """The tokens of a prompt, with those that the tokenizer itself puts around a text (a token that begins texts),
        as transformers' tokenizer(text) gives them. An empty prompt begins a new text: behind that token, else behind
        the end of another text.

        Args:
            is_chat: the text is a rendered template, whose special tokens are meant as such, and are all there are.
            what: names it in errors.
        Raises: ConfigError when nothing could follow it within the context, or it has a token that the model lacks.
        """
        self._require_short(len(text), what)
        return self.checked(self._tokens(text, is_chat=is_chat, has_around=not is_chat), text, what)

    def encode_parts(
        self, parts: Sequence[str | None], image_id: int, *, is_chat: bool = False, what: str = "The prompt"
    ) -> list[int]:
        """The tokens of a prompt with images, each text of it encoded by itself, image_id for None: those that a
        document with images has in training (data.image_tokens.encode_parts). Raises: ConfigError, as encode."""
        texts = [part for part in parts if part is not None]
        self._require_short(sum(map(len, texts)), what)
        tokens: list[int] = []
        for part in parts:
            tokens += [image_id] if part is None else self._tokens(part, is_chat=is_chat, has_around=False)
        return self.checked(tokens, " ".join(texts), what)

    def _tokens(self, text: str, *, is_chat: bool, has_around: bool) -> list[int]:
        if is_chat and self.backend.encode_special_tokens:
            self.backend.encode_special_tokens = False
        return list((self.backend if is_chat else self.plain).encode(text, add_special_tokens=has_around).ids)

    def _require_short(self, length: int, what: str) -> None:
        most = self.context_length * self.most_letters
        if length > most:  # before seconds are spent on its tokens
            raise ConfigError(
                f"{what} has {length:,} characters, but the {self.context_length} tokens of the context hold "
                f"{most:,} at most.",
                "Shorten it.",
            )

    def checked(self, tokens: list[int], text: str, what: str = "The prompt") -> list[int]:
        """`tokens` of a prompt, as encode returns them."""
        shown = text if len(text) <= 40 else f"{text[:37]}..."
        if not tokens and not self.end_ids:
            raise ConfigError(
                f"{what} {shown!r} is empty, and the model has no end token to begin a text with.",
                "Give a prompt of at least one token.",
            )
        if not tokens:
            return [min(self.end_ids)]
        if max(tokens) >= self.vocab_size:
            raise ConfigError(
                f"{what} {shown!r} has token {max(tokens)}, but model.vocab_size={self.vocab_size}.",
                "Use the tokenizer that the model was trained with.",
            )
        if len(tokens) >= self.context_length:
            raise ConfigError(
                f"{what} {shown!r} has {len(tokens)} tokens; with at least one new token the context of "
                f"{self.context_length} is too short.",
                f"Shorten it to {self.context_length - 1} tokens or fewer.",
            )
        return tokens

    def decode(self, tokens: Sequence[int], *, is_whole: bool = False) -> str:
        """The text of tokens that stand behind others: some tokenizers drop the space before a text's first word.

        Args:
            is_whole: nothing stands before them.
        """
        if is_whole or not tokens:
            return self._decoded(tokens)
        return self._decoded([*self.before, *tokens])[len(self._decoded(self.before)) :]

    def _decoded(self, tokens: Sequence[int]) -> str:
        return str(self.plain.decode(list(tokens), skip_special_tokens=False))

    def stop_test(self, stops: Sequence[str]) -> Callable[[list[int]], bool] | None:
        """Whether new tokens hold one of `stops`, as Request.is_stopped asks after each. None: there are no stops."""
        most = max((len(stop.encode()) for stop in stops), default=0) + 2 * _BYTES_OF_CHARACTER

        def is_stopped(new: list[int]) -> bool:
            # A stop ends in the last tokens. The part may begin inside a character, so it is tried from its next bytes.
            starts = range(max(0, len(new) - most - _BYTES_OF_CHARACTER), max(1, len(new) - most))
            return any(stop in text for text in (self.decode(new[at:]) for at in starts) for stop in stops)

        return is_stopped if stops else None

    def render(self, messages: Sequence[dict[str, Any]]) -> str:
        """Chat messages as the text that the model continues.

        Raises: ConfigError when the folder has no template, or the template refuses the messages.
        """
        if self.chat_template is None:
            raise ConfigError(
                "The folder has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json).",
                "Leave --chat out, or use a model that was trained on chats.",
            )
        return ChatTemplate(self.chat_template, self.special).render(messages)


def words_of_run(folder: Path, run: RunConfig) -> Words:
    """Of a step folder. Raises: DataError when the run has no tokenizer, or it is gone or damaged."""
    kept = folder / TOKENIZER_FOLDER
    if kept.is_dir():
        if changed := changed_files(kept):
            raise DataError(changed[0], f"Copy it again. If it is as it should be, remove {kept / SUMS}.")
        return words_of_files(kept, vocab_size=run.model.vocab_size, context_length=run.model.seq_length)
    words = words_of_data(run)
    if words is None:
        raise DataError("The run was trained on synthetic tokens: it has no tokenizer.", _CURE)
    return words


def words_of_data(run: RunConfig) -> Words | None:
    """Of the data that a run trains on; None: synthetic tokens without a tokenizer. Raises: DataError when it is gone
    or damaged."""
    path = tokenizer_path(run)
    if path is None:
        return None
    chat = path.parent / TOKENIZER_FOLDER
    if chat.is_dir():  # data of conversations
        return words_of_files(chat, vocab_size=run.model.vocab_size, context_length=run.model.seq_length)
    backend = load_backend(path)
    end = eos_of(backend)
    return Words(
        backend=backend,
        end_ids=frozenset() if end is None else frozenset({end}),
        vocab_size=run.model.vocab_size,
        context_length=run.model.seq_length,
    )


def words_of_files(folder: Path, *, vocab_size: int, context_length: int) -> Words:
    """Of a folder with tokenizer files of Hugging Face. Raises: DataError when tokenizer.json is missing or damaged."""
    path = folder / "tokenizer.json"
    try:
        backend = load_backend(path)
    except DataError as error:
        raise DataError(error.cause, "Copy or download the folder again.") from error
    if 2 * backend.get_vocab_size() < vocab_size:  # models round their vocabulary up, by far less
        raise DataError(
            f"{path} has {backend.get_vocab_size()} tokens, but model.vocab_size={vocab_size}: it is of another model.",
            "Use the tokenizer that the model was trained with.",
        )
    settings = read_json(folder / "tokenizer_config.json")
    generation = read_json(folder / "config.json") | read_json(folder / "generation_config.json")
    ends = generation.get("eos_token_id")
    return Words(
        backend=backend,
        end_ids=frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends]),
        vocab_size=vocab_size,
        context_length=context_length,
        chat_template=template_of(folder, settings),
        special=special_texts(settings),
    )


class Growing:
    """The text of tokens that come one at a time. Only those since the last two whole characters are decoded."""

    def __init__(self, words: Words):
        self.words = words
        self.tokens: list[int] = []
        self.num_told = 0
        """Of tokens, those whose text add has returned; they stay for what stands before the others."""
        self.length = 0
        """Of all that add has returned."""

    def add(self, token: int) -> str:
        """What is new; nothing while the text ends with half a character."""
        self.tokens.append(token)
        new = self.rest()
        if not new or new.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self.tokens = self.tokens[self.num_told :]
        self.num_told = len(self.tokens)
        self.length += len(new)
        return new

    def rest(self) -> str:
        """What no call of add has returned: half a character."""
        return self.words.decode(self.tokens)[len(self.words.decode(self.tokens[: self.num_told])) :]


def settled(text: str, stops: Iterable[str]) -> str:
    """The part of a growing text that further tokens cannot change: without half a character at its end, and without
    what may be the beginning of a stop string."""
    text = text.rstrip("\N{REPLACEMENT CHARACTER}")
    return text[: len(text) - max((_overlap(text, stop) for stop in stops), default=0)]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of a text that begins a stop string."""
    return next((length for length in range(min(len(text), len(stop)), 0, -1) if stop.startswith(text[-length:])), 0)


def cut_at_stop(text: str, stops: Iterable[str]) -> str:
    """The text before the first stop string in it."""
    ends = [at for at in (text.find(stop) for stop in stops if stop) if at >= 0]
    return text[: min(ends)] if ends else text

"""Byte-level BPE, trained here or read from a tokenizer.json of the `tokenizers` library. It encodes every text."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from gpt4moe.errors import DataError

EOS_TOKEN = "<|endoftext|>"
END_TOKENS = (EOS_TOKEN, "</s>", "<|end_of_text|>", "<eos>")
"""Names of the end-of-text token in tokenizers of others: the first that a tokenizer has is its EOS."""
# 256 bytes and EOS: with fewer, some texts could not be encoded.
SMALLEST_VOCABULARY = 257


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """Text <-> token ids. "<|endoftext|>" in a text is encoded as text: only preprocessing writes the EOS token."""

    backend: tokenizers.Tokenizer
    vocab_size: int
    eos_id: int

    @property
    def eos_token(self) -> str:
        return str(self.backend.id_to_token(self.eos_id))

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without EOS."""
        return list(self.backend.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """As encode, for many texts, on the threads that TOKENIZERS_PARALLELISM and RAYON_NUM_THREADS allow."""
        return [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, tokens: list[int]) -> str:
        """The text; EOS becomes "<|endoftext|>"."""
        return str(self.backend.decode(tokens, skip_special_tokens=False))


def train_tokenizer(texts: Iterable[str], *, vocab_size: int, special: Sequence[str] = ()) -> Tokenizer:
    """A byte-level BPE with GPT-2's split into words and exactly vocab_size entries; EOS is token 0, `special` follow.

    Raises: DataError when vocab_size is less than the bytes need, or the text has too few different pieces for it.
    """
    require_vocabulary(vocab_size)
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS_TOKEN, *special],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(_pieces(texts), trainer)
    found = backend.get_vocab_size()
    if found != vocab_size:
        raise DataError(
            f"The text yields a vocabulary of {found}, not {vocab_size}: it is too little.",
            f"Give more text, or ask for a vocabulary of {found} or fewer.",
        )
    return _ready(backend)


def require_vocabulary(vocab_size: int) -> None:
    """Raises: DataError when vocab_size is less than the bytes and EOS need."""
    if vocab_size < SMALLEST_VOCABULARY:
        raise DataError(
            f"A byte-level vocabulary of {vocab_size} is below {SMALLEST_VOCABULARY} (256 bytes and {EOS_TOKEN}).",
            f"Ask for {SMALLEST_VOCABULARY} or more; 4096 suits the demo.",
        )


def load_tokenizer(path: Path) -> Tokenizer:
    """Raises: DataError when the file is missing, is not a tokenizer, or has no end-of-text token."""
    return _ready(load_backend(path))


def load_backend(path: Path) -> tokenizers.Tokenizer:
    """A tokenizer.json, also one without our end-of-text token. Raises: DataError when it is missing or damaged."""
    if not path.is_file():
        raise DataError(
            f"The tokenizer {path} is missing.", "Name a tokenizer.json; `make data` makes data/demo/tokenizer.json."
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for every bad file
        raise DataError(
            f"{path} is no tokenizer ({error}).",
            "Name a tokenizer.json. In a data folder: restore it from its original, or make the folder again.",
        ) from error
    backend.no_truncation()  # settings of a file that would cut texts, or fill them up
    backend.no_padding()
    # Declared as no special token, what ends a text would be read out of any text that spells it.
    added = backend.get_added_tokens_decoder().values()
    backend.add_special_tokens([_as_special(token) for token in added if token.content in END_TOKENS])
    return backend


def _as_special(token: tokenizers.AddedToken) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(
        token.content, single_word=token.single_word, lstrip=token.lstrip, rstrip=token.rstrip,
        normalized=token.normalized, special=True,
    )  # fmt: skip


def eos_of(backend: tokenizers.Tokenizer) -> int | None:
    """The token that ends a text, of a tokenizer whose settings name none; None: it has none of END_TOKENS."""
    return next((found for name in END_TOKENS if (found := backend.token_to_id(name)) is not None), None)


def _ready(backend: tokenizers.Tokenizer) -> Tokenizer:
    eos_id = eos_of(backend)
    if eos_id is None:
        raise DataError(
            f"The tokenizer has none of {', '.join(END_TOKENS)}.", f"Add {EOS_TOKEN} to it as a special token."
        )
    backend.encode_special_tokens = True
    return Tokenizer(backend, vocabulary_size(backend), eos_id)


def vocabulary_size(backend: tokenizers.Tokenizer) -> int:
    """One more than the largest number of a token; some tokenizers leave numbers out."""
    return max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def _pieces(texts: Iterable[str]) -> Iterator[str]:
    """Lines: no word crosses one, and short pieces keep the trainer's threads evenly busy."""
    for text in texts:
        yield from text.splitlines(keepends=True)

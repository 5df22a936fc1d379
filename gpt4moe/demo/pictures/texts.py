"""Texts without pictures, for the language model of `make vision` and its tokenizer.

green kipo.     colours are named by new words, again and again: what few_shot asks, said in words. So the language
red dalo.       model knows how to name by examples before it sees any picture, as a large one does.
green kipo.

a large kipo triangle above the middle.     captions have new words in place of most sizes, colours and shapes. Else the
                                         language model would know which combinations are never learned, and hold
                                         that none of them is there, whatever is seen.

Captions of one shape to learn, with its picture, have some new words too. If they always said the true ones, a model
would learn which shapes and places follow "a small red", and hold by it against what is seen. After "a kipo red" all of
them have been learned (splits.py). Of so many new words none is ever the likeliest, so answers have true words.
"""

import random
from collections.abc import Iterator
from pathlib import Path

from gpt4moe.data.image_tokens import IMAGE_TOKEN
from gpt4moe.data.tokenizer import train_tokenizer
from gpt4moe.demo.pictures.drawing import COLOURS, DIRECTIONS, PLACES, RELATIONS, SHAPES, SIZES
from gpt4moe.demo.pictures.items import LETTERS, Item, new_word

VOCAB_SIZE = 512
"""Each word, letter and syllable is one token then."""
THINGS = {*SIZES, *COLOURS, *SHAPES}
_SHARE_RENAMED, _SHARE_RENAMED_SEEN = 0.6, 0.25
"""Of captions without pictures, of captions of one shape with its picture."""
_NUM_LINES, _NUM_FOR_TOKENIZER = 12, 300
_NUM_REPEATED, _NUM_REPETITIONS = 8, 4


def learned_text(item: Item, seed: int, number: int) -> str:
    """The text of item `number` to learn with its pictures; of attributes some things are called by new words."""
    if item.kind != "attributes":
        return item.text
    return _renamed(item.text, _SHARE_RENAMED_SEEN, random.Random(f"learned/{seed}/{number}"))


def caption(text: str, seed: int, number: int) -> str:
    """A caption for a reader without pictures: most of its things are called by new words."""
    return _renamed(text, _SHARE_RENAMED, random.Random(f"caption/{seed}/{number}"))


def _renamed(text: str, share: float, rng: random.Random) -> str:
    return " ".join(
        new_word(rng, "learned") if word in THINGS and rng.random() < share else word for word in text.split(" ")
    )


def naming(seed: int, number: int) -> str:
    """Text `number`, of two to four colours with a word each. No word is a held-out one of few_shot."""
    rng = random.Random(f"naming/{seed}/{number}")
    named = {colour: new_word(rng, "learned") for colour in rng.sample(list(COLOURS), rng.randint(2, 4))}
    return "\n".join(f"{colour} {named[colour]}." for colour in rng.choices(list(named), k=_NUM_LINES))


def repeating(seed: int, number: int) -> str:
    """Text `number`, a line of colours and new words in any order, said again and again."""
    rng = random.Random(f"repeating/{seed}/{number}")
    words = rng.sample([*COLOURS, *(new_word(rng, "learned") for _ in COLOURS)], _NUM_REPEATED)
    return "\n".join([" ".join(words)] * _NUM_REPETITIONS)


def write_tokenizer(path: Path) -> None:
    """A tokenizer.json of VOCAB_SIZE entries with the image token, the same each time."""
    texts = [*_sentences(), *(naming(0, number) for number in range(_NUM_FOR_TOKENIZER))]
    train_tokenizer(texts, vocab_size=VOCAB_SIZE, special=[IMAGE_TOKEN]).backend.save(str(path))


def _sentences() -> Iterator[str]:
    """Every word and letter of the other kinds' texts, more often than any syllable of new words."""
    often = 1000
    for word in (*SIZES, *COLOURS, *SHAPES, *" ".join((*PLACES, *RELATIONS)).split(), *DIRECTIONS, *LETTERS):
        yield f" {word}" * often
    yield " the page reads middle moves" * often
    yield from (f"{word}\n" * often for word in ("the", *COLOURS))

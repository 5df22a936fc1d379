"""Texts without pictures, for the language model of `make vision` and its tokenizer.

green kipo.     colours are named by new words, again and again: what few_shot asks, said in words. So the language
red dalo.       model knows how to name by examples before it sees any picture, as a large one does.
green kipo.

small red circle above large kipo ring.      what a picture shows, and then its caption, from two shapes or a word on
a large kipo ring is below a small red       a page. So the language model knows which words a caption looks for in what
circle.                                      it is about: what is between two shapes it tells from the one it named.

    a large kipo triangle at the top.    captions have new words in place of most sizes, colours and shapes. Else the
                                         language model would know which combinations are never learned, and hold
                                         that none of them is there, whatever is seen.
"""

import random
import re
from collections.abc import Iterator
from pathlib import Path

from gpt4moe.data.image_tokens import IMAGE_TOKEN
from gpt4moe.data.tokenizer import train_tokenizer
from gpt4moe.demo.pictures.drawing import COLOURS, DIRECTIONS, NUM_LETTERS, PLACES, RELATIONS, SHAPES, SIZES
from gpt4moe.demo.pictures.items import LETTERS, OTHER_WAY, new_word

VOCAB_SIZE = 512
"""Each word, letter and syllable is one token then."""
_SLOTS = ("left", "middle", "right")
"""Of the letters of a word."""
THINGS = {*SIZES, *COLOURS, *SHAPES}
_SHARE_RENAMED = 0.6
_SHARE_RENAMED_IN_SCENES = 0.5
_NUM_LINES, _NUM_FOR_TOKENIZER = 12, 300
_NUM_REPEATED, _NUM_REPETITIONS = 8, 4


def caption(text: str, seed: int, number: int) -> str:
    """A caption for a reader without pictures: most of its things are called by new words."""
    rng = random.Random(f"caption/{seed}/{number}")
    words = (
        new_word(rng, "learned") if word in THINGS and rng.random() < _SHARE_RENAMED else word
        for word in text.split(" ")
    )
    return " ".join(words)


def naming(seed: int, number: int) -> str:
    """Text `number`, of two to four colours with a word each. No word is a held-out one of few_shot."""
    rng = random.Random(f"naming/{seed}/{number}")
    named = {colour: new_word(rng, "learned") for colour in rng.sample(list(COLOURS), rng.randint(2, 4))}
    return "\n".join(f"{colour} {named[colour]}." for colour in rng.choices(list(named), k=_NUM_LINES))


def scene(text: str, seed: int, number: int) -> str:
    """What the picture of a caption shows, and the caption, with the same new words for some things in both.

    Args:
        text: a caption of two shapes, or of a word on a page.
    """
    rng = random.Random(f"scene/{seed}/{number}")
    said = text.rstrip(".").split(" ")
    if said[1] == "page":
        shown = [f"{slot} {letter}" for slot, letter in zip(_SLOTS, said[-NUM_LETTERS:], strict=True)]
        rng.shuffle(shown)
        return f"{' '.join(shown)}.\n{text}"
    first, relation, second = said[1:4], " ".join(said[5:-4]), said[-3:]
    if relation in OTHER_WAY:
        first, relation, second = second, OTHER_WAY[relation], first
    both = f"{' '.join((*first, relation, *second))}.\n{text}"
    new = {thing: new_word(rng, "learned") for thing in sorted(THINGS) if rng.random() < _SHARE_RENAMED_IN_SCENES}
    return re.sub(r"\w+", lambda found: new.get(found[0], found[0]), both)


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
    for word in (*SIZES, *COLOURS, *SHAPES, *PLACES, *" ".join(RELATIONS).split(), *DIRECTIONS, *_SLOTS, *LETTERS):
        yield f" {word}" * often
    yield " the page reads at is moves" * often
    yield from (f"{word}\n" * often for word in ("the", *COLOURS))

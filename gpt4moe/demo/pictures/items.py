"""Five kinds of items: pictures, a text with a tag for each, and the part of the text that is asked for.

    kind         text, from | on what is asked for                    held out, never learned
    attributes   <image>a| small red circle at the left.              40 of 240 combinations
    relations    <image>a small red circle is| above a large ...      a tenth of the coloured shapes with their relation
    words        <image>the page reads| k w x.                        a tenth of the words of three letters
    clips        <image>the| red circle moves left.                   a sixth of the combinations
    few_shot     four examples, then <image>| dax.                 words for colours that no other item has

An item of few_shot has two new words, each for one colour; only its own examples say which is which.
"""

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from gpt4moe.data.folder import held_out
from gpt4moe.data.image_tokens import IMAGE_TOKEN
from gpt4moe.demo.pictures.drawing import (
    COLOURS,
    DIRECTIONS,
    NUM_LETTERS,
    PLACES,
    RELATIONS,
    SHAPES,
    SIZES,
    Picture,
    draw_clip,
    draw_one,
    draw_page,
    draw_two,
)  # fmt: skip

FEW_SHOT = "few_shot"
NUM_EXAMPLES = 4
_NUM_HELD_COMBINATIONS = 40
LETTERS = "abcdefghijklmnopqrstuvwxyz"
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"
Thing = tuple[str, str, str]
"""Size, colour, shape."""
Found = TypeVar("Found")
_OPPOSITE = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    kind: str
    key: str
    """What is in one split alone."""
    images: list[list[Picture]]
    """Frames of each image, in the order of the tags."""
    prompt: str
    answer: str
    """The text is prompt + answer."""
    fields: dict[str, str]
    """Parts of the answer that are counted by themselves, in the order of the answer."""
    choices: tuple[str, ...] = ()
    """Answers to choose of, where there are few; the first is right."""
    in_words: tuple[str, ...] = ()
    """A word for each picture, where a text alone is to say the same; none: the text is said without them."""

    @property
    def text(self) -> str:
        return self.prompt + self.answer

    @property
    def text_alone(self) -> str:
        """What a language model learns that sees no pictures."""
        parts = self.text.split(IMAGE_TOKEN)
        words = self.in_words or ("",) * len(self.images)
        return parts[0] + "".join(word + part for word, part in zip(words, parts[1:], strict=True))


def items(kind: str, seed: int, count: int, *, is_held_out: bool) -> Iterator[Item]:
    """`count` items of one split; item n is a function of kind, seed and n."""
    for number in range(count):
        rng = random.Random(f"{kind}/{seed}/{'held' if is_held_out else 'learned'}/{number}")
        yield KINDS[kind](rng, is_held_out)


def read_fields(item: Item, said: str) -> dict[str, bool]:
    """Of each field of an item whether an answer has it right: the answer's words are compared place by place."""
    wanted, found = item.answer.rstrip(".").split(), said.strip().split(".")[0].split()
    right, at = {}, 0
    for name, value in item.fields.items():
        words = value.split()
        at = next(place for place in range(at, len(wanted)) if wanted[place : place + len(words)] == words)
        right[name] = found[at : at + len(words)] == words
        at += len(words)
    return right


def held_combinations() -> frozenset[tuple[str, str, str, str]]:
    """(size, colour, shape, place) of attributes that are never learned; every single value is."""
    every = list(itertools.product(SIZES, COLOURS, SHAPES, PLACES))
    random.Random("combinations").shuffle(every)
    return frozenset(every[:_NUM_HELD_COMBINATIONS])


_HELD = held_combinations()


def _attributes(rng: random.Random, is_held_out: bool) -> Item:
    size, colour, shape, place = found = _combination(rng, is_held_out)
    return Item(
        kind="attributes", key=" ".join(found), images=[[draw_one(rng, colour, shape, size, place)]],
        prompt=f"{IMAGE_TOKEN}a", answer=f" {size} {colour} {shape} at the {place}.",
        fields={"size": size, "colour": colour, "shape": shape, "place": place},
    )  # fmt: skip


def _relations(rng: random.Random, is_held_out: bool) -> Item:
    def draw() -> tuple[Thing, str, Thing]:
        first, second = _thing(rng), _thing(rng)
        while second[1:] == first[1:]:
            second = _thing(rng)
        return first, rng.choice(list(RELATIONS)), second

    first, relation, second = _until(draw, lambda found: _relation_key(*found), "relations", 0.1, is_held_out)
    return Item(
        kind="relations", key=_relation_key(first, relation, second), images=[[draw_two(rng, first, relation, second)]],
        prompt=f"{IMAGE_TOKEN}a {' '.join(first)} is", answer=f" {relation} a {' '.join(second)}.",
        fields={"relation": relation, "size": second[0], "colour": second[1], "shape": second[2]},
    )  # fmt: skip


def _relation_key(first: Thing, relation: str, second: Thing) -> str:
    """The same for both ways to say it, and for all sizes."""
    ways = [(first[1:], relation, second[1:]), (second[1:], _OPPOSITE[relation], first[1:])]
    one, how, other = min(ways)
    return f"{' '.join(one)} {how} {' '.join(other)}"


def _words(rng: random.Random, is_held_out: bool) -> Item:
    word = _until(lambda: "".join(rng.choices(LETTERS, k=NUM_LETTERS)), str, "words", 0.1, is_held_out)
    names = ("first", "second", "third")
    return Item(
        kind="words", key=word, images=[[draw_page(rng, word)]], prompt=f"{IMAGE_TOKEN}the page reads",
        answer=f" {' '.join(word)}.", fields=dict(zip(names, word, strict=True)),
    )  # fmt: skip


def _clips(rng: random.Random, is_held_out: bool) -> Item:
    def draw() -> tuple[str, str, str]:
        return rng.choice(list(COLOURS)), rng.choice(SHAPES), rng.choice(list(DIRECTIONS))

    colour, shape, direction = found = _until(draw, " ".join, "clips", 1 / 6, is_held_out)
    return Item(
        kind="clips", key=" ".join(found), images=[draw_clip(rng, colour, shape, direction)],
        prompt=f"{IMAGE_TOKEN}the", answer=f" {colour} {shape} moves {direction}.",
        fields={"colour": colour, "shape": shape, "direction": direction},
    )  # fmt: skip


def _few_shot(rng: random.Random, is_held_out: bool) -> Item:
    words: list[str] = []
    while len(words) < 2:
        word = new_word(rng, is_held_out)
        words += [] if any(word[:2] == other[:2] for other in words) else [word]  # their first tokens differ
    named = dict(zip(words, rng.sample(list(COLOURS), 2), strict=True))
    shown = words * (NUM_EXAMPLES // 2)
    rng.shuffle(shown)
    asked = rng.choice(words)
    pictures = [[_of_colour(rng, named[word])] for word in (*shown, asked)]
    examples = "".join(f"{IMAGE_TOKEN} {word}.\n" for word in shown)
    other = next(word for word in words if word != asked)
    return Item(
        kind=FEW_SHOT, key=" ".join(sorted(words)), images=pictures, prompt=f"{examples}{IMAGE_TOKEN}",
        answer=f" {asked}.", fields={"word": asked}, choices=(f" {asked}.", f" {other}."),
        in_words=tuple(named[word] for word in (*shown, asked)),
    )  # fmt: skip


KINDS: dict[str, Callable[[random.Random, bool], Item]] = {
    "attributes": _attributes, "relations": _relations, "words": _words, "clips": _clips, FEW_SHOT: _few_shot,
}  # fmt: skip


def without_examples(item: Item) -> Item:
    """An item of few_shot without its examples: the question alone."""
    question = item.prompt.rsplit(IMAGE_TOKEN, 1)[1]
    return Item(
        kind=item.kind, key=item.key, images=item.images[-1:], prompt=IMAGE_TOKEN + question, answer=item.answer,
        fields=item.fields, choices=item.choices,
    )  # fmt: skip


def _combination(rng: random.Random, is_held_out: bool) -> tuple[str, str, str, str]:
    while True:
        found = (*_thing(rng), rng.choice(list(PLACES)))
        if (found in _HELD) == is_held_out:
            return found


def _thing(rng: random.Random) -> Thing:
    return rng.choice(SIZES), rng.choice(list(COLOURS)), rng.choice(SHAPES)


def _of_colour(rng: random.Random, colour: str) -> Picture:
    """A picture of a combination that is learned, so that no held-out one is seen here."""
    while True:
        size, _, shape, place = _combination(rng, False)
        if (size, colour, shape, place) not in _HELD:
            return draw_one(rng, colour, shape, size, place)


def new_word(rng: random.Random, is_held_out: bool) -> str:
    """Two syllables that no other text here has: all but "page"."""

    def draw() -> str:
        return "".join(rng.choice(letters) for letters in (_CONSONANTS, _VOWELS, _CONSONANTS, _VOWELS))

    while True:
        word = _until(draw, str, FEW_SHOT, 0.2, is_held_out)
        if word != "page":
            return word


def _until(draw: Callable[[], Found], key: Callable[[Found], str], kind: str, share: float, is_held_out: bool) -> Found:
    """A draw whose key is of the split."""
    while True:
        found = draw()
        if held_out(f"{kind}/{key(found)}", share) == is_held_out:
            return found

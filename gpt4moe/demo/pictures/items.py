"""Five kinds of items: pictures, a text with a tag for each, and the part of the text that is asked for.

    kind         text, from | on what is asked for                    key: of one split alone (splits.py)
    attributes   <image>a| small red circle left of the middle.       the combination
    relations    <image>a small red circle| above a large ...         the coloured shapes with their relation
    words        <image>the page reads| k w x.                        the word of three letters
    clips        <image>the| red circle moves left.                   the combination
    few_shot     four times <image>red dax. and so on, <image>| red dax.   the two words for colours

How a shape stands is said in the same words of one and of two, so what is learned of one helps to find which of two
was named.

An item of few_shot has two new words, each for one colour. Only its examples say which; each says the colour's own word
before the new one. One to learn has eight examples.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

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
from gpt4moe.demo.pictures.splits import Split, split_of

FEW_SHOT = "few_shot"
NUM_EXAMPLES = 4
_NUM_LEARNED = 8
LETTERS = "abcdefghijklmnopqrstuvwxyz"
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"
Thing = tuple[str, str, str]
"""Size, colour, shape."""
Found = TypeVar("Found")
OTHER_WAY = {"below": "above", "right of": "left of"}
"""How the same is said of the other shape first, so that what stands above or left comes first."""
OPPOSITE = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}


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

    @property
    def text(self) -> str:
        return self.prompt + self.answer


def items(kind: str, seed: int, count: int, split: Split) -> Iterator[Item]:
    """`count` items of one split; item n is a function of kind, seed, split and n."""
    for number in range(count):
        yield KINDS[kind](random.Random(f"{kind}/{seed}/{split}/{number}"), split)


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


def _attributes(rng: random.Random, split: Split) -> Item:
    size, colour, shape, place = found = _combination(rng, split)
    return Item(
        kind="attributes", key=" ".join(found), images=[[draw_one(rng, colour, shape, size, place)]],
        prompt=f"{IMAGE_TOKEN}a", answer=f" {size} {colour} {shape} {place} the middle.",
        fields={"size": size, "colour": colour, "shape": shape, "place": place},
    )  # fmt: skip


def _relations(rng: random.Random, split: Split) -> Item:
    """Each stands where one such shape is learned to stand, so no held-out combination of attributes is seen here."""

    def draw() -> tuple[Thing, str, Thing]:
        while True:
            first, relation, second = _thing(rng), rng.choice(list(RELATIONS)), _thing(rng)
            stands = (*first, relation), (*second, OPPOSITE[relation])
            if second[1:] != first[1:] and all(split_of("attributes", " ".join(one)) == "learned" for one in stands):
                return first, relation, second

    first, relation, second = _until(draw, lambda found: _relation_key(*found), "relations", split)
    return Item(
        kind="relations", key=_relation_key(first, relation, second), images=[[draw_two(rng, first, relation, second)]],
        prompt=f"{IMAGE_TOKEN}a {' '.join(first)}", answer=f" {relation} a {' '.join(second)}.",
        fields={"relation": relation, "size": second[0], "colour": second[1], "shape": second[2]},
    )  # fmt: skip


def _relation_key(first: Thing, relation: str, second: Thing) -> str:
    """The same for both ways to say it, and for all sizes."""
    ways = [(first[1:], relation, second[1:]), (second[1:], OPPOSITE[relation], first[1:])]
    one, how, other = min(ways)
    return f"{' '.join(one)} {how} {' '.join(other)}"


def _words(rng: random.Random, split: Split) -> Item:
    word = _until(lambda: "".join(rng.choices(LETTERS, k=NUM_LETTERS)), str, "words", split)
    names = ("first", "second", "third")
    return Item(
        kind="words", key=word, images=[[draw_page(rng, word)]], prompt=f"{IMAGE_TOKEN}the page reads",
        answer=f" {' '.join(word)}.", fields=dict(zip(names, word, strict=True)),
    )  # fmt: skip


def _clips(rng: random.Random, split: Split) -> Item:
    def draw() -> tuple[str, str, str]:
        return rng.choice(list(COLOURS)), rng.choice(SHAPES), rng.choice(list(DIRECTIONS))

    colour, shape, direction = found = _until(draw, " ".join, "clips", split)
    held_out = [place for place in PLACES if split_of("attributes", f"small {colour} {shape} {place}") != "learned"]
    return Item(
        kind="clips", key=" ".join(found), images=[draw_clip(rng, colour, shape, direction, avoid=held_out)],
        prompt=f"{IMAGE_TOKEN}the", answer=f" {colour} {shape} moves {direction}.",
        fields={"colour": colour, "shape": shape, "direction": direction},
    )  # fmt: skip


def _few_shot(rng: random.Random, split: Split) -> Item:
    words: list[str] = []
    while len(words) < 2:
        word = new_word(rng, split)
        words += [] if any(word[:2] == other[:2] for other in words) else [word]
    named = dict(zip(words, rng.sample(list(COLOURS), 2), strict=True))
    shown = words * ((_NUM_LEARNED if split == "learned" else NUM_EXAMPLES) // 2)
    rng.shuffle(shown)
    asked = rng.choice(words)
    examples = "".join(f"{IMAGE_TOKEN}{named[word]} {word}.\n" for word in shown)
    return Item(
        kind=FEW_SHOT, key=" ".join(sorted(words)), images=[[_of_colour(rng, named[word])] for word in (*shown, asked)],
        prompt=f"{examples}{IMAGE_TOKEN}", answer=f"{named[asked]} {asked}.",
        fields={"colour": named[asked], "word": asked},
    )  # fmt: skip


KINDS: dict[str, Callable[[random.Random, Split], Item]] = {
    "attributes": _attributes, "relations": _relations, "words": _words, "clips": _clips, FEW_SHOT: _few_shot,
}  # fmt: skip


def told(item: Item) -> dict[str, set[str]]:
    """Field -> every value that the pictures make true of it: of two shapes those of either, and how they stand both
    ways."""
    found = {name: {value} for name, value in item.fields.items()}
    if item.kind == "relations":
        found["relation"].add(OPPOSITE[item.fields["relation"]])
        for name, value in zip(("size", "colour", "shape"), item.prompt.split()[1:4], strict=True):
            found[name].add(value)
    return found


def fields_denied(item: Item, other: Item) -> int:
    """How many fields of an item's answer are wrong for the pictures of another item of its kind."""
    seen = told(other)
    return sum(item.fields[name] not in seen[name] for name in item.fields)


def without_examples(item: Item) -> Item:
    """An item of few_shot without its examples: the question alone."""
    question = item.prompt.rsplit(IMAGE_TOKEN, 1)[1]
    return Item(
        kind=item.kind, key=item.key, images=item.images[-1:], prompt=IMAGE_TOKEN + question, answer=item.answer,
        fields=item.fields,
    )  # fmt: skip


def _combination(rng: random.Random, split: Split) -> tuple[str, str, str, str]:
    return _until(lambda: (*_thing(rng), rng.choice(list(PLACES))), " ".join, "attributes", split)


def _thing(rng: random.Random) -> Thing:
    return rng.choice(SIZES), rng.choice(list(COLOURS)), rng.choice(SHAPES)


def _of_colour(rng: random.Random, colour: str) -> Picture:
    """A picture of a combination that is learned, so that no held-out one is seen here."""
    while True:
        size, _, shape, place = _combination(rng, "learned")
        if split_of("attributes", f"{size} {colour} {shape} {place}") == "learned":
            return draw_one(rng, colour, shape, size, place)


def new_word(rng: random.Random, split: Split) -> str:
    """Two syllables that no other text here has: all but "page"."""

    def draw() -> str:
        return "".join(rng.choice(letters) for letters in (_CONSONANTS, _VOWELS, _CONSONANTS, _VOWELS))

    while True:
        word = _until(draw, str, FEW_SHOT, split)
        if word != "page":
            return word


def _until(draw: Callable[[], Found], key: Callable[[Found], str], kind: str, split: Split) -> Found:
    """A draw whose key is of the split."""
    while True:
        found = draw()
        if split_of(kind, key(found)) == split:
            return found

"""The drawn set: captions are true of the pixels, no held-out key is learned, everything follows from the seed."""

import hashlib
import json
import random
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gpt4moe.data.catalogue import Catalogue
from gpt4moe.data.tokenizer import train_tokenizer
from gpt4moe.demo.pictures.drawing import COLOURS, DIRECTIONS, PLACES, RELATIONS, SIDE, Picture, draw_page
from gpt4moe.demo.pictures.items import KINDS, OPPOSITE, Item, items, read_fields, without_examples
from gpt4moe.demo.pictures.make import SET_NAME, main, prepare_once, prepare_set, write_set
from gpt4moe.demo.pictures.splits import Split, split_of
from gpt4moe.demo.pictures.texts import THINGS, caption, learned_text, naming, repeating
from gpt4moe.errors import ConfigError, DataError

FEW = dict.fromkeys(KINDS, 12)


def some(kind: str, count: int, split: Split = "learned", *, seed: int = 0) -> list[Item]:
    return list(items(kind, seed, count, split))


def centre(picture: Picture, colour: str) -> tuple[float, float, int]:
    """Where the pixels of a colour lie: x and y from the middle, and how many there are."""
    away = np.abs(picture.astype(int) - np.array(COLOURS[colour])).max(axis=2)
    y, x = np.nonzero(away <= 15)
    assert x.size > 5, "nothing has the colour"
    return float(x.mean() - (SIDE - 1) / 2), float(y.mean() - (SIDE - 1) / 2), x.size


def towards(x: float, y: float, directions: dict[str, tuple[int, int]]) -> str:
    """The direction that is nearest."""
    return max(directions, key=lambda name: x * directions[name][0] + y * directions[name][1])


def test_the_caption_of_a_shape_says_its_colour_place_and_size() -> None:
    pixels: dict[tuple[str, str], list[int]] = {}
    splits: tuple[Split, ...] = ("learned", "asked")
    for split in splits:
        for item in some("attributes", 200, split):
            fields = item.fields
            x, y, count = centre(item.images[0][0], fields["colour"])
            assert towards(x, y, PLACES) == fields["place"]
            pixels.setdefault((fields["size"], fields["shape"]), []).append(count)
    for shape in ("circle", "square", "triangle", "cross", "ring"):
        assert max(pixels["small", shape]) < min(pixels["large", shape])


def test_the_caption_of_two_shapes_says_how_they_stand() -> None:
    for item in some("relations", 200):
        words = item.text.split()
        first, second = words[2], item.fields["colour"]
        if first != second:
            (x, y, _), (to_x, to_y, _) = (centre(item.images[0][0], colour) for colour in (first, second))
            assert towards(x - to_x, y - to_y, RELATIONS) == item.fields["relation"]


def test_the_caption_of_a_clip_says_where_the_shape_moves() -> None:
    for item in some("clips", 100):
        (x, y, _), *_, (to_x, to_y, _) = (centre(frame, item.fields["colour"]) for frame in item.images[0])
        assert towards(to_x - x, to_y - y, DIRECTIONS) == item.fields["direction"]


def test_a_letter_of_a_page_is_drawn_in_its_own_place_and_differs_from_every_other() -> None:
    letters = "abcdefghijklmnopqrstuvwxyz"
    pages = {letter: draw_page(random.Random(3), letter + "ox").astype(int) for letter in letters}
    for number, one in enumerate(letters):
        for other in letters[number + 1 :]:
            differs = np.nonzero(np.abs(pages[one] - pages[other]).max(axis=2))
            assert differs[0].size >= 2 and differs[1].max() < 13


@pytest.mark.parametrize(("split", "examples"), [("asked", 4), ("learned", 8)])
def test_examples_say_two_colours_by_two_new_words_and_so_does_the_question(split: Split, examples: int) -> None:
    for item in some("few_shot", 60, split):
        said = [line.removeprefix("<image>").rstrip(".").split() for line in item.text.split("\n")]
        assert len(said) == len(item.images) == examples + 1
        named = {word: colour for colour, word in said}
        assert len(named) == 2 == len(set(named.values())) and " ".join(sorted(named)) == item.key
        assert all(named[word] == colour for colour, word in said)
        assert [item.fields["colour"], item.fields["word"]] == said[-1]
        for (colour, _), (picture,) in zip(said, item.images, strict=True):
            assert _has(picture, colour)
        question = without_examples(item)
        assert question.prompt == "<image>" and question.images == item.images[-1:]


def _has(picture: Picture, colour: str) -> bool:
    return int((np.abs(picture.astype(int) - np.array(COLOURS[colour])).max(axis=2) <= 15).sum()) > 5


@pytest.mark.parametrize("kind", list(KINDS))
def test_what_is_asked_is_neither_learned_nor_read_while_training(kind: str) -> None:
    splits: tuple[Split, ...] = ("learned", "valid", "asked")
    keys, pictures = {}, {}
    for split in splits:
        found = some(kind, 400 if split == "learned" else 150, split) + some(kind, 100, split, seed=1)
        keys[split] = {item.key for item in found}
        assert all(split_of(kind, key) == split for item in found for key in _keys(item))
        pictures[split] = {b"".join(frame.tobytes() for frame in frames) for item in found for frames in item.images}
    for one, other in (("learned", "valid"), ("learned", "asked"), ("valid", "asked")):
        assert not keys[one] & keys[other]
        assert kind == "few_shot" or not pictures[one] & pictures[other]
    if kind == "few_shot":
        new = {word for item in some(kind, 150, "asked") + some(kind, 150, "valid") for word in item.key.split()}
        texts = " ".join(item.text for other in KINDS if other != kind for item in some(other, 50))
        assert not new & set(texts.replace(".", " ").split())


def test_no_held_out_combination_of_one_shape_stands_in_a_picture_of_two() -> None:
    for item in some("relations", 400):
        first, fields = item.prompt.split()[1:4], item.fields
        for thing, where in ((first, fields["relation"]), (list(fields.values())[1:], OPPOSITE[fields["relation"]])):
            assert split_of("attributes", f"{' '.join(thing)} {where}") == "learned"


def test_no_frame_of_a_learned_clip_shows_a_held_out_combination_of_one_shape() -> None:
    seen = set()
    for item in some("clips", 200):
        colour, shape, _ = item.fields.values()
        for frame in item.images[0]:
            y, x = np.nonzero(np.abs(frame.astype(int) - np.array(COLOURS[colour])).max(axis=2) <= 15)
            middle = [(SIDE - 1) / 2 - (one.min() + one.max()) / 2 for one in (x, y)]
            # Of one shape the middle is within a pixel of the place's, and drawn within half a pixel.
            for place, towards_it in PLACES.items():
                if all(abs(one + to) <= 1.5 for one, to in zip(middle, towards_it, strict=True)):
                    assert split_of("attributes", f"small {colour} {shape} {place}") == "learned"
                    seen.add(place)
    assert seen == set(PLACES)


@pytest.mark.parametrize("kind", ["attributes", "clips"])
def test_two_held_out_combinations_that_differ_in_one_word_differ_in_their_colour(kind: str) -> None:
    found = sorted(
        {tuple(item.fields.values()) for split in ("asked", "valid") for item in some(kind, 1000, split)}  # type: ignore[arg-type]
    )
    assert len(found) == {"attributes": 56, "clips": 28}[kind]
    for number, one in enumerate(found):
        for other in found[number + 1 :]:
            differs = [a for a, b in zip(one, other, strict=True) if a != b]
            assert len(differs) > 1 or differs[0] in COLOURS


def _keys(item: Item) -> list[str]:
    return item.key.split() if item.kind == "few_shot" else [item.key]


def test_no_held_out_new_word_is_in_a_text_that_is_learned_without_pictures() -> None:
    held = {word for item in some("few_shot", 200, "asked") for word in item.key.split()}
    texts = " ".join(write(0, number) for write in (naming, repeating) for number in range(300))
    texts += " ".join(caption("a small red circle", 0, number) for number in range(300))
    words = set(texts.replace(".", " ").split())
    assert len(held) > 100 and len(words) > 500 and not held & words
    assert len({naming(0, 1), naming(0, 2), naming(1, 1)}) == 3 and naming(0, 1) == naming(0, 1)


def test_a_caption_without_pictures_seldom_says_a_whole_combination() -> None:
    said = [caption("a small red circle left of the middle.", 0, number) for number in range(400)]
    whole = sum(text == "a small red circle left of the middle." for text in said)
    assert 10 < whole < 50 and all(text.startswith("a ") and text.endswith(" left of the middle.") for text in said)


def test_a_caption_of_one_shape_to_learn_has_new_words_in_place_of_some_things() -> None:
    said = {kind: [learned_text(item, 0, number) for number, item in enumerate(some(kind, 400))] for kind in KINDS}
    assert all(said[kind] == [item.text for item in some(kind, 400)] for kind in KINDS if kind != "attributes")
    renamed = Counter()
    for item, text in zip(some("attributes", 400), said["attributes"], strict=True):
        for name, seen, word in zip(
            ("a", "size", "colour", "shape"), item.text.split(" "), text.split(" "), strict=False
        ):
            assert word == seen or (word not in THINGS and len(word) == 4)
            renamed[name] += word != seen
        assert text.endswith(f" {item.fields['place']} the middle.")
    assert all(70 < renamed[name] < 130 for name in ("size", "colour", "shape")) and not renamed["a"]
    assert not {word for text in said["attributes"] for word in text.split()} & {
        word for item in some("few_shot", 200, "asked") for word in item.key.split()
    }


def test_every_single_value_of_what_is_held_out_is_learned() -> None:
    asked = {kind: {item.key for item in some(kind, 1000, "asked")} for kind in ("attributes", "clips")}
    assert {kind: len(keys) for kind, keys in asked.items()} == {"attributes": 40, "clips": 20}
    for word, count in {"small": 20, "ring": 8, "above": 10}.items():
        assert sum(word in key.split() for key in asked["attributes"]) == count
    assert sum("up" in key.split() for key in asked["clips"]) == 5
    for kind in ("attributes", "relations", "clips", "words"):
        learned, held = (
            {(name, value) for item in found for name, value in item.fields.items()}
            for found in (some(kind, 400), some(kind, 100, "asked"))
        )
        assert held <= learned


@pytest.mark.parametrize("kind", list(KINDS))
def test_an_item_is_a_function_of_its_kind_seed_and_number(kind: str) -> None:
    def digest(found: list[Item]) -> list[str]:
        pixels = [b"".join(frame.tobytes() for frames in item.images for frame in frames) for item in found]
        return [hashlib.sha256(item.text.encode() + seen).hexdigest() for item, seen in zip(found, pixels, strict=True)]

    assert digest(some(kind, 20)) == digest(some(kind, 30))[:20] != digest(some(kind, 20, seed=1))
    assert len({frame.shape for item in some(kind, 20) for frames in item.images for frame in frames}) == 1


def test_fields_are_compared_place_by_place() -> None:
    item = some("relations", 1)[0]
    assert all(read_fields(item, item.answer).values())
    assert all(read_fields(item, item.answer + " A later sentence.").values())
    assert not any(read_fields(item, " nothing of it").values()) and not any(read_fields(item, "").values())
    word = some("words", 1)[0]
    first, second, third = word.fields.values()
    other = "a" if second != "a" else "b"
    assert read_fields(word, f"{first} {other} {third}.") == {"first": True, "second": False, "third": True}


def test_a_set_is_written_prepared_and_used_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "drawn"
    write_set(folder, learned=FEW, asked=FEW)
    lines = [json.loads(line) for line in (folder / "items.jsonl").read_text().splitlines()]
    assert len(lines) == 60 and {line["kind"] for line in lines} == set(KINDS)
    for line in lines:
        names = [name for image in line["images"] for name in ([image] if isinstance(image, str) else image)]
        assert line["prompt"].count("<image>") == len(line["images"])
        assert all(Image.open(folder / name).size == (SIDE, SIDE) for name in names)
    assert Image.open(folder / "sheet.png").size[0] > 4 * 180
    before = (folder / "sheet.png").stat().st_mtime_ns
    write_set(folder, learned=FEW, asked=FEW)
    assert (folder / "sheet.png").stat().st_mtime_ns == before
    assert json.loads((folder / SET_NAME).read_text())["seed"] == 0
    with tarfile.open(folder / "words-valid.tar") as tar:
        read = {tar.extractfile(entry).read().decode() for entry in tar if entry.name.endswith(".txt")}  # type: ignore[union-attr]
    asked = {line["prompt"] + line["answer"] for line in lines if line["kind"] == "words"}
    assert len(read) == len(asked) == 12 and not {f"<image>{text}" for text in read} & asked
    texts = [json.loads(line)["text"] for line in (folder / "captions.jsonl").read_text().splitlines()]
    assert len(texts) == 60 and not any("<image>" in text for text in texts)
    own = prepare_once(folder, folder / "tokenizer.json")
    made = {path: path.stat().st_mtime_ns for path in own.rglob("*")}
    assert prepare_once(folder, folder / "tokenizer.json") == own and len(made) > 50
    assert {path: path.stat().st_mtime_ns for path in own.rglob("*")} == made
    tokenizer = tmp_path / "tokenizer.json"
    train_tokenizer(texts * 5, vocab_size=400).backend.save(str(tokenizer))
    with pytest.raises(DataError, match="no token <image>"):
        prepare_set(folder, tmp_path / "data", tokenizer)
    with pytest.raises(ConfigError, match="of another set or of another tokenizer"):
        prepare_once(folder, tokenizer)
    found = prepare_set(folder, tmp_path / "data", tokenizer, "--add-image-token", "replace")
    assert {kind: one["train"]["documents"] for kind, one in found.items()} == FEW
    assert found["clips"]["train"]["frames"] == 48 and found["few_shot"]["train"]["most_images"] > 5
    assert sorted(Catalogue.open([tmp_path / "data"]).sources) == sorted(KINDS)
    assert main(["--out", str(tmp_path / "other"), "--tokenizer", str(tmp_path / "none.json"), "--scale", "0.002"]) == 2
    assert "none.json is missing" in capsys.readouterr().err

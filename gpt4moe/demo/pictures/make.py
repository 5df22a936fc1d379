"""Makes the drawn set: `python -m gpt4moe.demo.pictures.make --out data/drawn`

FOLDER/<kind>-train.tar, <kind>-valid.tar   samples of WebDataset for tools/prepare_media.py, a source for each kind
FOLDER/items.jsonl, images/                 items to be asked; what is held out in valid.tar is not among them
FOLDER/captions, names, repeats .jsonl   texts to learn without pictures, for a language model
FOLDER/tokenizer.json                       of these texts, with the image token
FOLDER/sheet.png                            some of each kind, for people
FOLDER/set.json                             seed and counts; written last
"""

import argparse
import io
import json
import sys
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from gpt4moe.config.checksums import file_sha256
from gpt4moe.data.folder import TOKENIZER_NAME
from gpt4moe.data.image_tokens import IMAGE_TOKEN
from gpt4moe.data.manifest import MANIFEST_NAME, SPLITS, write_json
from gpt4moe.data.pictures import encode_png
from gpt4moe.data.tokenizer import load_backend
from gpt4moe.demo.pictures.items import FEW_SHOT, KINDS, Item, items
from gpt4moe.demo.pictures.sheet import write_sheet
from gpt4moe.demo.pictures.texts import caption, learned_text, naming, repeating, write_tokenizer
from gpt4moe.errors import ConfigError, DataError, Gpt4MoeError
from gpt4moe.media.command import prepare

LEARNED = {"attributes": 8000, "relations": 12000, "words": 12000, "clips": 3000, "few_shot": 2500}
ASKED = {"attributes": 400, "relations": 400, "words": 300, "clips": 200, "few_shot": 400}
SET_NAME, MADE_OF = "set.json", "made_of.json"
TEXTS = ("captions", "names", "repeats")
"""Texts to learn without pictures."""
_TEXTS_PER_ITEM = 6
"""Of few_shot."""
_SHOWN, _VERSION = 4, 9


def write_set(
    folder: Path, *, seed: int = 0, learned: Mapping[str, int] = LEARNED, asked: Mapping[str, int] = ASKED
) -> None:
    """Writes all files, unless a set of the same seed and counts is there.

    Args:
        learned, asked: items of each kind to learn, and of each of both held-out splits (splits.py).
    """
    made_as = {"version": _VERSION, "seed": seed, "learned": dict(learned), "asked": dict(asked)}
    done = folder / SET_NAME
    if done.is_file() and json.loads(done.read_text()) == made_as:
        return
    (folder / "images").mkdir(parents=True, exist_ok=True)
    done.unlink(missing_ok=True)
    tiles, captions = [], []
    with (folder / "items.jsonl").open("w", encoding="utf-8") as lines:
        for kind in KINDS:
            to_ask = list(items(kind, seed, asked[kind], "asked"))
            for number, item in enumerate(to_ask):
                lines.write(json.dumps(_asked(folder, f"{kind}-{number:04}", item)) + "\n")
            to_learn = enumerate(items(kind, seed, learned[kind], "learned"))
            held_out = items(kind, seed, asked[kind], "valid")
            write_tar(folder / f"{kind}-valid.tar", ((item, item.text) for item in held_out))
            said = write_tar(
                folder / f"{kind}-train.tar", ((item, learned_text(item, seed, number)) for number, item in to_learn)
            )
            captions += said if kind == FEW_SHOT else [caption(text, seed, number) for number, text in enumerate(said)]
            tiles += [([frame for frames in item.images for frame in frames], _shown(item)) for item in to_ask[:_SHOWN]]
    more = range(_TEXTS_PER_ITEM * learned[FEW_SHOT])
    copied = [naming(seed, number) for number in more], [repeating(seed, number) for number in more]
    for name, texts in zip(TEXTS, (captions, *copied), strict=True):
        lines_of = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"{name}.jsonl").write_text(lines_of, encoding="utf-8")
    write_tokenizer(folder / TOKENIZER_NAME)
    write_sheet(folder / "sheet.png", tiles, columns=_SHOWN)
    write_json(done, made_as)


def write_tar(path: Path, found: Iterable[tuple[Item, str]]) -> list[str]:
    """Items, each with its text, as samples of WebDataset: a .png (or the frames' numbers) with a .txt, or a .json
    where there are several images. Returns: the texts alone, without images."""
    texts = []
    with tarfile.open(path, "w") as tar:
        for number, (item, text) in enumerate(found):
            for name, content in _members(item, text):
                entry = tarfile.TarInfo(f"{number:06}.{name}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
            texts.append(text.replace(IMAGE_TOKEN, ""))
    return texts


def prepare_set(folder: Path, out: Path, tokenizer: Path, *more: str) -> dict[str, Any]:
    """The tars of a set as sources of a data folder, one for each kind: tools/prepare_media.py.

    Args:
        more: further options of it, --add-image-token replace say.
    Returns: what each source has. Raises: ConfigError, DataError.
    """
    words = ["--tokenizer", str(tokenizer), "--out", str(out), *more]
    for kind in KINDS:
        train, valid = (folder / f"{kind}-{split}.tar" for split in SPLITS)
        words += ["--source", f"{kind}={train}", "--valid", f"{kind}={valid}", "--licence", f"{kind}=CC0-1.0"]
    return prepare(words, lambda documents: None)


def prepare_once(folder: Path, tokenizer: Path) -> Path:
    """The sources of a set in FOLDER/data, unless they are there; a tokenizer without an image token gets one.

    Raises: ConfigError when they are there with another tokenizer or of another set; as prepare_set.
    """
    out, mark = folder / "data", folder / "data" / MADE_OF
    made_of = {"set": json.loads((folder / SET_NAME).read_text()), "tokenizer": file_sha256(_present(tokenizer))}
    if mark.is_file() and json.loads(mark.read_text()) == made_of:
        return out
    if (out / MANIFEST_NAME).is_file():
        raise ConfigError(
            f"{out} has sources of another set or of another tokenizer than {tokenizer}.",
            f"Remove {out} to make them anew, or give another --out.",
        )
    has_token = load_backend(tokenizer).token_to_id(IMAGE_TOKEN) is not None
    prepare_set(folder, out, tokenizer, *(() if has_token else ("--add-image-token", "replace")))
    write_json(mark, made_of)
    return out


def _present(path: Path) -> Path:
    if not path.is_file():
        raise DataError(f"The tokenizer {path} is missing.", "Give --tokenizer FILE, the tokenizer.json of --out say.")
    return path


def _members(item: Item, text: str) -> Iterator[tuple[str, bytes]]:
    if len(item.images) > 1:
        names = [f"{number}.png" for number in range(len(item.images))]
        yield from ((name, encode_png(frames[0])) for name, frames in zip(names, item.images, strict=True))
        yield "json", json.dumps({"text": text, "images": names}).encode()
        return
    (frames,) = item.images
    names = ["png"] if len(frames) == 1 else [f"{number}.png" for number in range(len(frames))]
    yield from ((name, encode_png(frame)) for name, frame in zip(names, frames, strict=True))
    yield "txt", text.removeprefix(IMAGE_TOKEN).encode()


def _asked(folder: Path, name: str, item: Item) -> dict[str, Any]:
    """A line of items.jsonl; its images are written."""
    images = []
    for number, frames in enumerate(item.images):
        paths = [f"images/{name}-{number}-{frame}.png" for frame in range(len(frames))]
        for path, frame in zip(paths, frames, strict=True):
            (folder / path).write_bytes(encode_png(frame))
        images.append(paths if len(paths) > 1 else paths[0])
    return {
        "id": name, "kind": item.kind, "key": item.key, "prompt": item.prompt, "images": images, "answer": item.answer,
        "fields": item.fields,
    }  # fmt: skip


def _shown(item: Item) -> str:
    return " ".join(f"{item.prompt}|{item.answer}".replace(IMAGE_TOKEN, "* ").split())


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 made or there already, 2 bad input."""
    parser = argparse.ArgumentParser(prog="python -m gpt4moe.demo.pictures.make", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("data/drawn"), help="folder to make (data/drawn)")
    parser.add_argument("--seed", type=int, default=0, help="of the pictures (0)")
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of items (1.0)")
    parser.add_argument("--tokenizer", type=Path, help="make sources too, in OUT/data: OUT/tokenizer.json, "
                        "or another one, to which <image> is added")  # fmt: skip
    given = parser.parse_args(arguments)
    try:
        learned, asked = (
            {kind: max(1, round(number * given.scale)) for kind, number in some.items()} for some in (LEARNED, ASKED)
        )
        write_set(given.out, seed=given.seed, learned=learned, asked=asked)
        if given.tokenizer is not None:
            prepare_once(given.out, given.tokenizer)
    except Gpt4MoeError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    sys.stdout.write(f"{given.out}: {sum(learned.values()):,} items to learn, {sum(asked.values()):,} held out.\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

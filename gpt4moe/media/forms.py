"""Lines with images -> texts and names of images in their order, checked. Four forms of a line:

    {"text": "A cat <image> sleeps.", "images": ["cat.jpg"]}                  each tag is the next image
    {"texts": ["A cat", null, "sleeps."], "images": [null, "cat.jpg", null]}  OBELICS: at each place one of the two
    {"text_list": ["A cat."], "image_info": [{"image_name": "cat.jpg", "matched_text_index": 0}]}    MMC4: before it
    {"image": "cat.jpg", "caption": "A cat sleeps."}                          a pair; frames in place of image: a clip

In place of a name a list of names is a clip: its frames in order. What is no image of a form is not looked at.
"""

from collections.abc import Callable, Sequence
from typing import Any

from gpt4moe.data.image_tokens import IMAGE_TOKEN, split_tags
from gpt4moe.errors import DataError

Frames = tuple[str, ...]
"""Names of the frames of one image; a still image has one."""
Part = str | Frames
"""A text or an image."""
EXAMPLE = '{"text": "A cat <image> sleeps.", "images": ["cat.jpg"]}'
_WRITE = f"Write {EXAMPLE}, or another form of docs/vision-data.md; --bad-rows skip leaves such lines out."
_MEND = "Mend the line, or --bad-rows skip."


def parts_of(row: Any, where: str) -> list[Part]:
    """The texts and images of a line.

    Args:
        where: file and line, for errors.
    Raises: DataError for another form, a tag without an image or an image without a tag, a tag in a text that has
        none to have, and a line without an image or without a text.
    """
    if not isinstance(row, dict):
        raise DataError(f"{where} is no JSON object.", _WRITE)
    form = next((read for keys, read in _FORMS.items() if all(key in row for key in keys)), None)
    if form is None:
        raise DataError(
            f"{where} has the keys {', '.join(map(str, row)) or 'of nothing'}: no form with images.", _WRITE
        )
    parts = [part for part in form(row, where) if part]
    if not any(isinstance(part, tuple) for part in parts):
        raise DataError(f"{where} has no image.", "Put it into a source of text (tools/tokenize_corpus.py).")
    if not any(isinstance(part, str) and part.strip() for part in parts):
        raise DataError(f"{where} has no text: there is nothing to learn of its images.", _MEND)
    return parts


def pair(image: Any, caption: Any, where: str) -> list[Part]:
    """An image and what is said of it. Raises: DataError."""
    return [_image(image, f"{where}: its image"), _plain(caption, f"{where}: its caption").strip()]


def _tagged(row: dict[str, Any], where: str) -> list[Part]:
    text, images = row["text"], _listed(row["images"], where, "images")
    if not isinstance(text, str):
        raise DataError(f"{where}: text is {_type(text)}.", _WRITE)
    parts = split_tags(text)
    tags = parts.count(None)
    if tags != len(images):
        more = "an image tag without an image" if tags > len(images) else "an image without a tag"
        raise DataError(f"{where}: {more}: {tags} times {IMAGE_TOKEN} in the text, {len(images)} images.", _MEND)
    frames = iter(_image(image, f"{where}, image {number}") for number, image in enumerate(images))
    return [next(frames) if part is None else part for part in parts]


def _obelics(row: dict[str, Any], where: str) -> list[Part]:
    texts, images = (_listed(row[key], where, key) for key in ("texts", "images"))
    if len(texts) != len(images):
        raise DataError(f"{where}: {len(texts)} texts and {len(images)} images: one is null where the other is.", _MEND)
    parts: list[Part] = []
    for number, (text, image) in enumerate(zip(texts, images, strict=True)):
        at = f"{where}, place {number}"
        if text is not None and image is not None:
            raise DataError(f"{at} has a text and an image.", "Set one of them to null.")
        parts += [] if image is None else [_image(image, at)]
        parts += [] if text is None else [_plain(text, at)]
    return parts


def _mmc4(row: dict[str, Any], where: str) -> list[Part]:
    texts, infos = (_listed(row[key], where, key) for key in ("text_list", "image_info"))
    before: dict[int, list[Part]] = {}
    for number, info in enumerate(infos):
        at = f"{where}, image {number}"
        index = info.get("matched_text_index") if isinstance(info, dict) else None
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(texts):
            raise DataError(f"{at}: matched_text_index is {index!r}, of {len(texts)} texts.", _MEND)
        before.setdefault(index, []).append(_image(info.get("image_name"), at))
    parts: list[Part] = []
    for number, text in enumerate(texts):
        space = " " if number + 1 < len(texts) else ""
        parts += [*before.get(number, []), _plain(text, f"{where}, text {number}") + space]
    return parts


def _pair(key: str) -> Callable[[dict[str, Any], str], list[Part]]:
    def read(row: dict[str, Any], where: str) -> list[Part]:
        image = row[key] if key == "image" else _listed(row[key], where, key)
        return pair(image, row["caption"] if "caption" in row else row.get("text"), where)

    return read


_FORMS: dict[tuple[str, ...], Callable[[dict[str, Any], str], list[Part]]] = {
    ("text", "images"): _tagged, ("texts", "images"): _obelics, ("text_list", "image_info"): _mmc4,
    ("image",): _pair("image"), ("frames",): _pair("frames"),
}  # fmt: skip
"""Keys that a form has -> its reader."""
INTERLEAVED = tuple(keys for keys in _FORMS if len(keys) == 2)


def _image(value: Any, at: str) -> Frames:
    names = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else ()
    if not names or not all(isinstance(name, str) and name for name in names):
        raise DataError(f"{at} is {_type(value)}: no name of a file and no list of names.", _MEND)
    address = next((name for name in names if "://" in name), None)
    if address is not None:
        raise DataError(f"{at} is the address {address}.", "Download images first, and name their files.")
    return names


def _plain(text: Any, at: str) -> str:
    if not isinstance(text, str):
        raise DataError(f"{at} is {_type(text)}, no text.", _MEND)
    if IMAGE_TOKEN in text:
        raise DataError(
            f"{at}: an image tag without an image: {IMAGE_TOKEN} is written out in a text of a form without tags.",
            _MEND,
        )
    return text


def _listed(value: Any, where: str, name: str) -> Sequence[Any]:
    if not isinstance(value, list):
        raise DataError(f"{where}: {name} is {_type(value)}, no list.", _WRITE)
    return value


def _type(value: Any) -> str:
    return "missing" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"

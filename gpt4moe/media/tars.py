"""Samples of a WebDataset tar, read by the webdataset library, in the order of the tar.

    key.jpg key.txt                        a pair; without .txt the caption of key.json, as img2dataset writes it
    key.0.jpg key.1.jpg key.json           interleaved: the .json is a line of forms.py, which names "0.jpg" and "1.jpg"
    key.000.jpg key.001.jpg key.txt        a clip: the frames in the order of their numbers

Nothing is decoded but JSON and text: members of other kinds, pickles among them, are not looked at.
"""

import json
import re
import tarfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from webdataset import tariterators

from gpt4moe.data.pictures import by_number, is_image
from gpt4moe.errors import DataError
from gpt4moe.media.forms import INTERLEAVED, Part, pair, parts_of
from gpt4moe.media.inputs import BadItem, Item, read_item

_END = 1024
"""Zeros at the end of a tar."""
_FRAME = re.compile(r"\d+\.\w+")


def of_tar(path: Path) -> Iterator[Item | BadItem]:
    """Raises: DataError for a tar that is damaged or has a name twice."""
    _require_end(path)
    with path.open("rb") as stream:  # opened here: the library would take names such as "pipe:..." for commands
        files = tariterators.tar_file_expander([{"url": str(path), "stream": stream}])
        samples = tariterators.group_by_keys(files)
        try:
            for sample in samples:
                members = {name: data for name, data in sample.items() if isinstance(data, bytes)}
                where = f"{path}:{sample['__key__']}"
                yield read_item(where, partial(_parts, members, where), partial(_member, members))
        except (tarfile.TarError, EOFError, OSError, ValueError) as error:
            raise DataError(f"{path} is no whole tar: {error.args[0]}.", "Copy or download it again.") from error


def _require_end(path: Path) -> None:
    """Raises: DataError when a plain tar lacks the zeros at its end: tarfile reads one that is cut as a shorter one."""
    if path.suffix != ".tar":
        return
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - _END))
        if stream.read() != bytes(_END):
            raise DataError(f"{path} is no whole tar: its end mark is missing.", "Copy or download it again.")


def _parts(members: dict[str, bytes], where: str) -> list[Part]:
    images = sorted((name for name in members if is_image(f"frame.{name}")), key=by_number)
    row = _json(members["json"], where) if "json" in members else None
    if isinstance(row, dict) and any(all(key in row for key in keys) for keys in INTERLEAVED):
        parts = parts_of(row, where)
        named = {frame.lower() for part in parts if isinstance(part, tuple) for frame in part}
        unused = [name for name in images if name not in named]
        if unused:
            raise DataError(f"{where}: an image without a tag: {unused[0]} is not named.", "Mend the sample.")
        return parts
    if "txt" in members:
        caption: Any = _text(members["txt"], where)
    else:
        caption = (row.get("caption") or row.get("text")) if isinstance(row, dict) else None
    if caption is None or not images:
        problem = "an image without a caption" if images else "a sample without an image"
        raise DataError(
            f"{where}: {problem}: its members are {', '.join(sorted(members)) or 'none'}.",
            "Give KEY.jpg and KEY.txt, or an interleaved KEY.json; --bad-rows skip leaves such samples out.",
        )
    if len(images) > 1 and not all(map(_FRAME.fullmatch, images)):
        raise DataError(
            f"{where}: {len(images)} images of one caption: {', '.join(images)}.",
            "Number the frames of a clip (KEY.000.jpg), or write an interleaved KEY.json.",
        )
    return pair(images, caption, where)


def _member(members: dict[str, bytes], name: str) -> bytes:
    if name.lower() not in members:  # the library writes names small
        raise DataError("the tar has no member of this name in the sample", "Add it, or mend the JSON.")
    return members[name.lower()]


def _json(data: bytes, where: str) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: its .json is no JSON ({error}).", "Mend the sample.") from error


def _text(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: its .txt is no UTF-8 ({error.reason}).", "Mend the sample.") from error

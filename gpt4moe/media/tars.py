"""Samples of a WebDataset tar, grouped by the webdataset library, in the order of the tar.

    key.jpg key.txt                        a pair; without .txt the caption of key.json, as img2dataset writes it
    key.0.jpg key.1.jpg key.json           interleaved: the .json is a line of forms.py, which names "0.jpg" and "1.jpg"
    key.000.jpg key.001.jpg key.txt        a clip: the frames in the order of their numbers

Nothing is decoded but JSON and text: members of other kinds, pickles among them, are not read.
"""

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from webdataset import tariterators

from gpt4moe.data.lines import parsed
from gpt4moe.data.pictures import by_number, is_image
from gpt4moe.errors import DataError
from gpt4moe.media.forms import EXAMPLE, INTERLEAVED, Part, pair, parts_of
from gpt4moe.media.inputs import BadItem, Item, read_item

_END = 1024
"""Zeros at the end of a tar."""
_META = re.compile(r"__[^/]*__($|/)")
"""Members of the library's own, no samples."""
_FRAME = re.compile(r"\d+\.\w+")


@dataclass(frozen=True, slots=True)
class _TooLarge:
    """A member that is not read."""

    size: int


Members = dict[str, bytes | _TooLarge]


def of_tar(path: Path, max_bytes: int) -> Iterator[Item | BadItem]:
    """
    Args:
        max_bytes: of a member; a larger one is not read.
    Raises: DataError for a tar that is damaged or has a name twice.
    """
    _require_end(path)
    samples = tariterators.group_by_keys(_members(path, max_bytes))
    try:
        for sample in samples:
            members = {name: data for name, data in sample.items() if isinstance(data, bytes | _TooLarge)}
            where = f"{path}:{sample['__key__']}"
            yield read_item(where, partial(_parts, members, where, max_bytes), partial(_image, members, max_bytes))
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        raise DataError(f"{path} is no whole tar: {error.args[0]}.", "Copy or download it again.") from error


def _members(path: Path, max_bytes: int) -> Iterator[dict[str, Any]]:
    """As the library's tar_file_iterator gives them, which reads members of any size."""
    with tarfile.open(path, mode="r|*") as tar:
        for member in tar:
            if not member.isreg() or _META.match(member.name):
                continue
            is_read = is_image(member.name) or member.name.lower().endswith((".txt", ".json"))
            stream = tar.extractfile(member) if is_read and member.size <= max_bytes else None
            data = stream.read() if stream is not None else _TooLarge(member.size) if is_read else b""
            yield {"fname": member.name, "data": data, "__url__": str(path)}
            tar.members = []  # type: ignore[attr-defined]  # tarfile keeps the head of every member


def _require_end(path: Path) -> None:
    """Raises: DataError when a plain tar lacks the zeros at its end: tarfile reads one that is cut as a shorter one."""
    if path.suffix != ".tar":
        return
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - _END))
        if stream.read() != bytes(_END):
            raise DataError(f"{path} is no whole tar: its end mark is missing.", "Copy or download it again.")


def _parts(members: Members, where: str, max_bytes: int) -> list[Part]:
    images = sorted((name for name in members if is_image(f"frame.{name}")), key=by_number)
    texts = {
        name: _text(members[name], f"{where}: its .{name}", max_bytes) for name in ("json", "txt") if name in members
    }
    row = parsed(f"{where}: its .json", texts["json"], EXAMPLE) if "json" in texts else None
    if isinstance(row, dict) and any(all(key in row for key in keys) for keys in INTERLEAVED):
        parts = parts_of(row, where)
        named = {frame.lower() for part in parts if isinstance(part, tuple) for frame in part}
        unused = [name for name in images if name not in named]
        if unused:
            raise DataError(f"{where}: an image without a tag: {unused[0]} is not named.", "Mend the sample.")
        return parts
    if "txt" in texts:
        caption: Any = texts["txt"]
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


def _image(members: Members, max_bytes: int, name: str) -> bytes:
    found = members.get(name.lower())  # the library writes names small
    if found is None:
        raise DataError("the tar has no member of this name in the sample", "Add it, or mend the JSON.")
    if isinstance(found, _TooLarge):
        raise DataError(f"it has {found.size:,} bytes, more than {max_bytes:,}", "Raise --max-bytes.")
    return found


def _text(data: bytes | _TooLarge, where: str, max_bytes: int) -> str:
    if isinstance(data, _TooLarge):
        raise DataError(f"{where} has {data.size:,} bytes, more than {max_bytes:,}.", "Raise --max-bytes.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is no UTF-8 ({error.reason}).", "Mend the sample.") from error

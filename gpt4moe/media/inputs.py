"""Where documents with images come from, each as an item: where it stands, its parts, and a way to its images' bytes.

FILE.jsonl   a line is a document or a pair; images lie beside the file, or in --images FOLDER
FOLDER       pairs: NAME.jpg and NAME.txt; or clips: the frames of a folder NAME, and NAME.txt
FILE.tar     samples of WebDataset (tars.py)
"""

import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from gpt4moe.data.lines import parsed, text_lines
from gpt4moe.data.pictures import by_number, is_image
from gpt4moe.errors import DataError
from gpt4moe.media.forms import EXAMPLE, Part, pair, parts_of

Load = Callable[[str], bytes]


@dataclass(frozen=True, slots=True)
class Item:
    """A document that is read, its images not yet."""

    where: str
    """File and line, file and key in a tar, or file: for errors and lists."""
    parts: list[Part]
    load: Load
    """Name of an image -> its bytes. Raises: DataError, without a name."""


@dataclass(frozen=True, slots=True)
class BadItem:
    """A document that is none."""

    where: str
    error: DataError


def items(paths: Sequence[Path], images: Path | None, max_bytes: int) -> Iterator[Item | BadItem]:
    """All documents, in order.

    Args:
        images: folder of the images that lines of jsonl name; None: the folder of the file.
        max_bytes: of an image's file, or a member of a tar; a larger one is not read.
    Raises: DataError for a path that is missing, of another kind or has no document.
    """
    for path in paths:
        if path.is_dir():
            found = _of_folder(path, max_bytes)
        elif path.suffix in (".jsonl", ".ndjson") and path.is_file():
            found = _of_lines(path, path.parent if images is None else images, max_bytes)
        elif path.is_file() and (path.suffix == ".tar" or path.name.endswith((".tar.gz", ".tgz"))):
            from gpt4moe.media.tars import of_tar  # webdataset imports torch: seconds that others need not wait

            found = of_tar(path, max_bytes)
        else:
            problem = "is of a kind that is not read" if path.exists() else "is missing"
            raise DataError(f"{path} {problem}.", "Name a .jsonl file, a folder of pairs, or a .tar of WebDataset.")
        is_empty = True
        for item in found:
            is_empty = False
            yield item
        if is_empty:
            raise DataError(f"{path} has no document with images.", "Name another one, or leave it out.")


def read_item(where: str, parts: Callable[[], list[Part]], load: Load) -> Item | BadItem:
    """An item, or why it is none."""
    try:
        return Item(where, parts(), load)
    except DataError as error:
        return BadItem(where, error)


def _of_lines(path: Path, images: Path, max_bytes: int) -> Iterator[Item | BadItem]:
    if not images.is_dir():
        raise DataError(f"--images {images} is no folder.", "Name the folder that the images' names begin in.")
    load = partial(_file_within, images.resolve(), max_bytes)
    for line, where in text_lines([path]):
        yield read_item(where, partial(_parts_of_line, line, where), load)


def _parts_of_line(line: str, where: str) -> list[Part]:
    return parts_of(parsed(where, line, EXAMPLE), where)


def _of_folder(folder: Path, max_bytes: int) -> Iterator[Item | BadItem]:
    """In the order of the names. A caption without an image, and the reverse, is a bad item."""
    stems: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if path.is_dir() or is_image(path) or path.suffix == ".txt":
            stems.setdefault(path.name if path.is_dir() else path.stem, []).append(path)
    load = partial(_file_within, folder.resolve(), max_bytes)
    for paths in stems.values():
        yield read_item(str(paths[0]), partial(_parts_of_stem, folder, paths), load)


def _parts_of_stem(folder: Path, paths: Sequence[Path]) -> list[Part]:
    captions = [path for path in paths if path.suffix == ".txt" and path.is_file()]
    others = [path for path in paths if path not in captions]
    if len(captions) != 1 or len(others) != 1:
        names = " and ".join(path.name for path in paths)
        problem = "an image without a caption" if not captions else (
            "a caption without an image" if not others else "several images of one caption"
        )  # fmt: skip
        raise DataError(f"{folder}: {problem}: {names}.", "Give NAME.txt and NAME.jpg, or a folder NAME of frames.")
    caption, image = captions[0], others[0]
    try:
        text = caption.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{caption} cannot be read ({error}).", "Give a text in UTF-8.") from error
    if not image.is_dir():
        return pair(image.name, text, str(caption))
    frames = sorted((str(frame.relative_to(folder)) for frame in image.iterdir() if is_image(frame)), key=by_number)
    if not frames:
        raise DataError(f"{image} has no image, and {caption.name} is its caption.", "Give the frames of the clip.")
    return pair(frames, text, str(caption))


def _file_within(folder: Path, max_bytes: int, name: str) -> bytes:
    try:
        path = (folder / name).resolve()
    except (OSError, ValueError, RuntimeError) as error:  # a loop of links; a zero byte in the name
        raise DataError(f"its name leads to no file ({error})", "Name a file.") from error
    if not path.is_relative_to(folder):
        raise DataError("its name leads out of the images' folder", "Name files within it (--images FOLDER).")
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # to read a pipe would wait for ever
            raise DataError("it is no regular file", "Give the image's file.")
        if status.st_size > max_bytes:
            raise DataError(f"it has {status.st_size:,} bytes, more than {max_bytes:,}", "Raise --max-bytes.")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"it cannot be read: {error.strerror}", "Give the file.") from error

"""Documents of a part of a file: jsonl (also .gz and .zst), parquet, plain text, a file of a source tree.

Every error names the file, the line or row, and the cure. Memory: one document, or one batch of parquet rows.
"""

import dataclasses
import gzip
import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from gpt4moe.corpus.compressed import unpacked
from gpt4moe.errors import DataError

LARGEST_DOCUMENT = 1 << 28
"""Bytes. A larger line or file is a mistake more often than a document, and would not fit a process's memory."""
_ROWS = 512
"""Of parquet, decoded at once."""
_REPORT = 64
"""Documents between two reports of progress."""


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of a file: bytes of a plain jsonl, row groups of a parquet file, else the whole."""

    path: str
    kind: str
    start: int
    stop: int


@dataclass(slots=True)
class Notes:
    """What is known of parts beside their documents."""

    skipped: Counter[str] = dataclasses.field(default_factory=Counter)
    """Files of a tree that are no text, by reason."""
    files: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    """Path and sha256 of each file that is a document."""
    lines: list[tuple[str, int]] = dataclasses.field(default_factory=list)
    """Of each part of a jsonl that was read to its end: path, and its lines."""


TO_UTF8 = "iconv -f LATIN1 -t UTF-8 FILE > NEW"
Advance = Callable[[int], None]
"""Called with the number of bytes of a file that were just read."""
Document = tuple[str, bytes, int]
"""Text, the same as UTF-8, and its line or row (place_of)."""


def read_part(part: Part, field: str, advance: Advance, notes: Notes) -> Iterator[Document]:
    """
    Args:
        field: of a JSON object, or column of a parquet file, that has the text.
        notes: gets what is known of the part.
    Raises: DataError.
    """
    try:
        if part.kind == "parquet":
            yield from _parquet(part, field, advance)
        elif part.kind in ("text", "tree"):
            yield from _file(part, advance, notes)
        else:
            yield from _jsonl(part, field, advance, notes)
    except OSError as error:
        raise DataError(
            f"{part.path} cannot be read: {error}.", "Restore the file, and run the command again."
        ) from error


def place_of(part: Part, number: int) -> str:
    """Of a document: file:line, where a part that begins within a file is counted from the file's first line."""
    if part.kind in ("text", "tree"):
        return part.path
    if part.kind == "parquet":
        return f"{part.path} row {number}"
    before = 0
    if part.start:
        with open(part.path, "rb") as stream:
            left = part.start - 1
            while left and (block := stream.read(min(left, 1 << 20))):
                before += block.count(b"\n")
                left -= len(block)
            before += 1  # the line in which the part begins belongs to the part before
    return f"{part.path}:{before + number}"


def _jsonl(part: Part, field: str, advance: Advance, notes: Notes) -> Iterator[Document]:
    if part.kind != "jsonl" and not part.stop:
        raise DataError(f"{part.path} is empty: not even an empty {part.kind} file is.", "Fetch it again.")
    with open(part.path, "rb", buffering=1 << 20) as raw:
        stream, stop = unpacked(raw, part.kind), part.stop if part.kind == "jsonl" else None
        number, reported, position = 0, part.start, part.start
        try:
            if part.start:
                raw.seek(part.start - 1)
                line = stream.readline(LARGEST_DOCUMENT + 1)
                if len(line) > LARGEST_DOCUMENT:
                    raise _too_long(part, 0)
                position += len(line) - 1
            readline, loads = stream.readline, orjson.loads
            while stop is None or position < stop:
                number += 1
                line = readline(LARGEST_DOCUMENT + 1)
                if not line:
                    number -= 1
                    break
                size = len(line)
                if size > LARGEST_DOCUMENT:
                    raise _too_long(part, number)
                position += size
                if position == size:
                    line = _without_mark(line, part)
                try:
                    text = loads(line)[field]
                    data = text.encode()
                except (ValueError, KeyError, TypeError, AttributeError):
                    if not line.isspace():
                        yield *_text(line, field, part, number), number
                else:
                    yield text, data, number
                if number % _REPORT == 0:
                    now = position if stop is not None else raw.tell()
                    advance(now - reported)
                    reported = now
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(
                f"{place_of(part, number)}: the compressed file is damaged or cut short ({error}).",
                "Fetch it again (gzip -t or zstd -t FILE tests it); nothing of it was kept.",
            ) from error
        notes.lines.append((part.path, number))
        advance(part.stop - reported)


def _too_long(part: Part, number: int) -> DataError:
    return DataError(
        f"{place_of(part, number)} has more than {LARGEST_DOCUMENT:,} bytes.",
        "Write one JSON object a line (jq -c '.[]' makes lines of an array), and cut documents that are larger.",
    )


_MARKS = {
    b"\x1f\x8b": ("gzip", "Name it .jsonl.gz."), b"\x28\xb5\x2f\xfd": ("zstd", "Name it .jsonl.zst."),
    b"PAR1": ("parquet", "Name it .parquet."), b"\xff\xfe": ("UTF-16", "iconv -f UTF-16 -t UTF-8 FILE > NEW"),
    b"\xfe\xff": ("UTF-16", "iconv -f UTF-16 -t UTF-8 FILE > NEW"),
}  # fmt: skip


def _without_mark(line: bytes, part: Part) -> bytes:
    """The first line without a byte order mark of UTF-8. Raises: DataError for a file of another kind."""
    for mark, (kind, cure) in _MARKS.items():
        if line.startswith(mark):
            raise DataError(f"{part.path} is {kind} inside, its name says {part.kind}.", cure)
    return line.removeprefix(b"\xef\xbb\xbf")


_BESIDE_TEXT = {"id", "media", "metadata"}
"""Keys of datatrove's JsonlWriter (0.10.1), which leaves out what is empty: the text of an empty document too."""


def _text(line: bytes, field: str, part: Part, number: int) -> tuple[str, bytes]:
    """Of a line that orjson takes for none: the standard library, which takes NaN and great numbers, has the last
    word."""
    cure = f'Write one JSON object a line with a text: {{"{field}": "..."}}. --field names another key.'
    try:
        found = json.loads(line.decode())
        if field == "text" and isinstance(found, dict) and "id" in found and found.keys() <= _BESIDE_TEXT:
            return "", b""
        text = found[field]
    except UnicodeDecodeError as error:
        raise _no_utf8(place_of(part, number), error) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        what = f"has no key {field!r}" if isinstance(error, KeyError) else f"is no JSON object ({error})"
        raise DataError(f"{place_of(part, number)} {what}.", cure) from error
    if not isinstance(text, str):
        raise DataError(f"{place_of(part, number)}: {field!r} is of type {type(text).__name__}, no string.", cure)
    return text, _encoded(text, part, number)


def _encoded(text: str, part: Part, number: int) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place_of(part, number)} has half of a surrogate pair (\\u{ord(text[error.start]):04x}) at character "
            f"{error.start}: that is no text.",
            "Remove it, or write the other half; a program cut the text in the middle of a character.",
        ) from error


def _no_utf8(place: str, error: UnicodeDecodeError) -> DataError:
    return DataError(
        f"{place} is not UTF-8: byte {error.object[error.start]:#04x} at {error.start}.",
        f"If it is Latin-1: {TO_UTF8}, and name NEW.",
    )


def _file(part: Part, advance: Advance, notes: Notes) -> Iterator[Document]:
    is_tree = part.kind == "tree"
    advance(part.stop)
    if part.stop > LARGEST_DOCUMENT:
        if not is_tree:
            raise DataError(
                f"{part.path} has {part.stop:,} bytes, a document may have {LARGEST_DOCUMENT:,}.",
                "A plain text file is one document. Cut it, or write a jsonl of a document a line.",
            )
        notes.skipped["too large"] += 1
        return
    data = Path(part.path).read_bytes()
    if b"\0" in data and is_tree:
        notes.skipped["binary"] += 1
        return
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        if not is_tree:
            raise _no_utf8(part.path, error) from error
        notes.skipped["not UTF-8"] += 1
        return
    notes.files.append((part.path, hashlib.sha256(data).hexdigest()))  # with its byte order mark, as sha256sum does
    yield text.removeprefix("\ufeff"), data.removeprefix(b"\xef\xbb\xbf"), 1


def _parquet(part: Part, field: str, advance: Advance) -> Iterator[Document]:
    import pyarrow as pa

    file = _open_parquet(part.path)
    names = file.schema_arrow.names
    if field not in names:
        raise DataError(f"{part.path} has no column {field!r}.", f"Name one with --field: {', '.join(names)}.")
    if names.count(field) > 1:
        raise DataError(f"{part.path} has {names.count(field)} columns {field!r}.", "Rename all but one of them.")
    kind = file.schema_arrow.field(field).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise DataError(f"{part.path}: column {field!r} is of type {kind}, no string.", "Name one with --field.")
    row = sum(file.metadata.row_group(group).num_rows for group in range(part.start))
    for group in range(part.start, part.stop):
        try:
            for batch in file.iter_batches(_ROWS, row_groups=[group], columns=[field]):
                for text in batch.column(0).to_pylist():
                    if text is None:
                        raise DataError(f"{place_of(part, row)}: {field!r} is null.", "Remove rows without a text.")
                    yield text, _encoded(text, part, row), row
                    row += 1
        except UnicodeDecodeError as error:
            raise _no_utf8(place_of(part, row), error) from error
        except pa.ArrowException as error:
            raise DataError(f"{place_of(part, row)}: the file is damaged ({error}).", "Fetch it again.") from error
        advance(_group_bytes(file, group))


def row_group_bytes(path: str) -> list[int]:
    """Compressed bytes of each row group. Raises: DataError for a file that is no parquet."""
    file = _open_parquet(path)
    return [_group_bytes(file, group) for group in range(file.metadata.num_row_groups)]


def _group_bytes(file: Any, group: int) -> int:
    columns = file.metadata.row_group(group)
    return sum(columns.column(number).total_compressed_size for number in range(columns.num_columns))


def _open_parquet(path: str) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is no parquet file ({error}).", "Fetch it again, or rename it by its kind.") from error

"""jsonl as checked fields. No torch."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gpt4moe.errors import DataError

Types = Mapping[str, type | tuple[type, ...]]


def read_lines(path: Path, types: Types, *, needed: Sequence[str], example: str) -> list[dict[str, Any]]:
    """The fields of each line that is not blank; "line" is its number, "id" the line's own or its number, "whole" all
    of its fields as they stand there.

    Args:
        types: of the fields that are read; others are in "whole" alone.
        needed: fields that every line has.
        example: a right line, for the error.
    Raises: DataError for a file that cannot be read or has no line, and for the first line that is none.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}).", f"Give a file of lines {example}.") from error
    found = [
        _fields(f"{path}, line {number}", line, types, needed, example) | {"line": number}
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not found:
        raise DataError(f"{path} is empty.", f"Give lines {example}.")
    return [{"id": fields["line"]} | fields for fields in found]


def text_lines(paths: Sequence[Path]) -> Iterator[tuple[str, str]]:
    """Lines that are not blank, with file and line number. A byte order mark is left out.

    Raises: DataError when a file is missing, is no UTF-8, or begins as one JSON array.
    """
    for path in paths:
        if not path.is_file():
            raise DataError(f"{path} is missing.", "Name an existing file of one JSON object a line.")
        with path.open("rb") as stream:
            is_first = True
            for number, raw in enumerate(stream, start=1):
                try:
                    line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise DataError(
                        f"{path}:{number} is no UTF-8 ({error.reason}).", "Give a plain text file, unpacked, in UTF-8."
                    ) from error
                if is_first and line.lstrip().startswith("["):
                    raise DataError(
                        f"{path} begins as one JSON array, not as lines of a JSON object each.",
                        f"Write its objects as lines, for example: jq -c '.[]' {path} > lines.jsonl",
                    )
                if line.strip():
                    is_first = False
                    yield line, f"{path}:{number}"


def require_own_ids(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Raises: DataError when two lines of read_lines have the same id."""
    seen: set[str | int] = set()
    for line in lines:
        if line["id"] in seen:
            raise DataError(f"{path} has the id {line['id']!r} twice.", "Give each line an id of its own, or none.")
        seen.add(line["id"])


def parsed(where: str, line: str, example: str) -> Any:
    """What a line of JSON says. Raises: DataError when it is none, or has half of a character."""
    shown = _shown(line)
    try:
        fields = json.loads(line)
        # JSON can name half of a surrogate pair (\ud800), which is no character and cannot be written as UTF-8.
        json.dumps(fields, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where} has half of a surrogate pair: {shown}", f"Write whole characters: {example}."
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is no JSON: {shown}", f"Write {example}.") from error
    return fields


def _shown(line: str) -> str:
    return line if len(line) <= 60 else f"{line[:57]}..."


def _fields(where: str, line: str, types: Types, needed: Sequence[str], example: str) -> dict[str, Any]:
    fields, shown = parsed(where, line, example), _shown(line)
    if not isinstance(fields, dict):
        raise DataError(f"{where} is no JSON object: {shown}", f"Write {example}.")
    missing = [name for name in needed if name not in fields]
    if missing:
        raise DataError(f"{where} has no {missing[0]!r}: {shown}", f"Write {example}.")
    kinds = {**types, "id": (str, int)}
    wrong = [name for name in kinds if name in fields and not _is(fields[name], kinds[name])]
    if wrong:
        raise DataError(f"{where} has {wrong[0]}={fields[wrong[0]]!r}, of a wrong kind.", f"Write {example}.")
    return {name: fields[name] for name in kinds if name in fields} | {"whole": fields}


def _is(value: object, kinds: type | tuple[type, ...]) -> bool:
    """bool is an int for Python, and none here; lists are of texts."""
    if isinstance(value, list) and not all(isinstance(one, str) for one in value):
        return False
    return isinstance(value, kinds) and not isinstance(value, bool)

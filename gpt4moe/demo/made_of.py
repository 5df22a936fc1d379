"""What a folder of `make vision` was made of, in a file beside it: FOLDER.made_of.json.

A folder that is there is taken as it is, so it must be what was asked for.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gpt4moe.data.manifest import write_json
from gpt4moe.errors import LaunchError

_MOST_NAMED = 4
_NOTHING = "nothing"


def mark_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.made_of.json")


def require_made_of(folder: Path, made_of: Mapping[str, Any]) -> None:
    """Writes the mark of a folder that is still to be made; compares that of one that is there, whole or in part.

    Args:
        made_of: settings, and hashes of what was read; as JSON takes it.
    Raises: LaunchError when it was made of something else, or nothing says of what.
    """
    mark, asked = mark_of(folder), json.loads(json.dumps(made_of))
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        write_json(mark, asked)
        return
    if not mark.is_file():
        raise LaunchError(f"{folder} is there, but {mark.name} beside it is not.", f"Delete {folder} to make it anew.")
    found = json.loads(mark.read_text(encoding="utf-8"))
    if found != asked:
        was, now = dict(_flat(found)), dict(_flat(asked))
        other = [key for key in sorted(was | now) if was.get(key, _NOTHING) != now.get(key, _NOTHING)]
        named = [f"{key} {was.get(key, _NOTHING)}, not {now.get(key, _NOTHING)}" for key in other[:_MOST_NAMED]]
        more = f" and {len(other) - _MOST_NAMED} more" if len(other) > _MOST_NAMED else ""
        raise LaunchError(
            f"{folder} was made with {'; '.join(named)}{more}.",
            f"Delete {folder} to make it anew, or ask for what it was made of ({mark}).",
        )


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key -> value that is no object."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{path}.{key}" if path else key)
    else:
        yield path, value

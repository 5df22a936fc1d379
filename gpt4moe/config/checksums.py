"""SHA256SUMS: the sha256 of files that lie beside it and that no manifest has, as `sha256sum -c` reads it."""

import hashlib
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SUMS = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")
_PART_BYTES = 1 << 22
_THREADS = 8
"""Hashing lets other threads run: an export of terabytes would take an hour with one."""


Advance = Callable[[int], None]
"""Called with the bytes that were just hashed, from several threads."""


def sums_text(folder: Path, paths: Sequence[Path], advance: Advance | None = None) -> str:
    """The content of a SHA256SUMS of these files of a folder. Raises: OSError."""
    with ThreadPoolExecutor(_THREADS) as pool:
        found = zip(pool.map(lambda path: file_sha256(path, advance), paths), paths, strict=True)
        return as_lines({path.relative_to(folder).as_posix(): sha256 for sha256, path in found})


def as_lines(sums: dict[str, str]) -> str:
    """The content of a SHA256SUMS.

    Args:
        sums: name in the folder -> sha256.
    """
    return "".join(f"{sha256}  {name}\n" for name, sha256 in sums.items())


def read_sums(folder: Path) -> dict[str, str] | None:
    """Name -> sha256, as the folder's SHA256SUMS says; empty where it has none. None: it is damaged."""
    path = folder / SUMS
    if not os.path.isfile(path):
        return {}
    try:
        lines = [_LINE.fullmatch(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):
        return None
    sums = {line[2]: line[1] for line in lines if line is not None}
    # One without a line is what a full disk leaves of a copy.
    is_readable = bool(lines) and None not in lines and all(_is_within(name) for name in sums)
    return sums if is_readable else None


def changed_files(folder: Path, *, without: str = "", advance: Advance | None = None) -> list[str]:
    """What is gone, or has other bytes than the folder's SHA256SUMS says, in words; empty where it has none.

    Args:
        without: how the names of files end that are not looked at.
    """
    sums = read_sums(folder)
    if sums is None:
        return [f"{folder / SUMS} is damaged."]
    with ThreadPoolExecutor(_THREADS) as pool:
        names = [name for name in sums if not (without and name.endswith(without))]
        return [found for found in pool.map(lambda name: _change(folder, name, sums[name], advance), names) if found]


def _is_within(name: str) -> bool:
    """Printable too: it is printed, and may be of a download that would write to the terminal."""
    return not Path(name).is_absolute() and ".." not in Path(name).parts and name.isprintable()


def _change(folder: Path, name: str, sha256: str, advance: Advance | None) -> str:
    path = folder / name
    try:
        if not path.is_file():  # nor a device, which never ends
            return f"{path} is missing."
        return (
            ""
            if file_sha256(path, advance) == sha256
            else f"{path} is not what was written: {SUMS} has another sha256."
        )
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}."


def file_sha256(path: Path, advance: Advance | None = None) -> str:
    """Raises: OSError."""
    with path.open("rb") as stream:
        if advance is None:
            return hashlib.file_digest(stream, "sha256").hexdigest()
        digest = hashlib.sha256()
        while part := stream.read(_PART_BYTES):
            digest.update(part)
            advance(len(part))
        return digest.hexdigest()

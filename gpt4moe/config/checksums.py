"""SHA256SUMS: the sha256 of files that lie beside it and that no manifest has, as `sha256sum -c` reads it."""

import hashlib
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SUMS = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")
_THREADS = 8
"""Hashing lets other threads run: an export of terabytes would take an hour with one."""


def sums_text(folder: Path, paths: Sequence[Path]) -> str:
    """The content of a SHA256SUMS of these files of a folder. Raises: OSError."""
    with ThreadPoolExecutor(_THREADS) as pool:
        found = zip(pool.map(file_sha256, paths), paths, strict=True)
        return "".join(f"{sha256}  {path.relative_to(folder).as_posix()}\n" for sha256, path in found)


def changed_files(folder: Path, *, without: str = "") -> list[str]:
    """What is gone, or has other bytes than the folder's SHA256SUMS says, in words; empty where it has none.

    Args:
        without: how the names of files end that are not looked at.
    """
    path = folder / SUMS
    if not os.path.isfile(path):
        return []
    try:
        lines = [_LINE.fullmatch(line) for line in path.read_text(encoding="utf-8").splitlines()]
        sums = {line[2]: line[1] for line in lines if line is not None}
        # One without a line is what a full disk leaves of a copy.
        is_readable = bool(lines) and None not in lines and all(_is_within(name) for name in sums)
    except (OSError, ValueError):
        is_readable = False
    if not is_readable:
        return [f"{path} is damaged."]
    with ThreadPoolExecutor(_THREADS) as pool:
        names = [name for name in sums if not (without and name.endswith(without))]
        return [found for found in pool.map(lambda name: _change(folder, name, sums[name]), names) if found]


def _is_within(name: str) -> bool:
    """Printable too: it is printed, and may be of a download that would write to the terminal."""
    return not Path(name).is_absolute() and ".." not in Path(name).parts and name.isprintable()


def _change(folder: Path, name: str, sha256: str) -> str:
    path = folder / name
    try:
        if not path.is_file():  # nor a device, which never ends
            return f"{path} is missing."
        return "" if file_sha256(path) == sha256 else f"{path} is not what was written: {SUMS} has another sha256."
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}."


def file_sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

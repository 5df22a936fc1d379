"""What a power failure must not undo: contents and names are on the disk before anything relies on them."""

import ctypes
import os
from pathlib import Path

_HERE, _EXCHANGE = -100, 2
"""AT_FDCWD and RENAME_EXCHANGE of renameat2(2)."""


def sync_file(path: Path) -> None:
    """Makes a file's contents durable, not its name."""
    _sync(path)


def sync_folder(folder: Path) -> None:
    """Makes renames in a folder durable."""
    _sync(folder)


def sync_files(folder: Path) -> None:
    """Makes the contents of a folder's files durable, and their names."""
    for path in sorted(folder.iterdir()):
        if path.is_file():
            _sync(path)
    _sync(folder)


def exchange(one: Path, other: Path) -> bool:
    """Swaps two names of one file system in one step, so that neither is ever missing. False, and nothing is done:
    this system cannot (NFS and Lustre, Linux before 3.15)."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    return rename is not None and rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

"""What a power failure must not undo: contents and names are on the disk before anything relies on them."""

import os
from pathlib import Path


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


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

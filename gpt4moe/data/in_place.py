"""A source takes the place of an older one, and no kill loses either.

.NAME-xxxxxxxx/new --swapped in one step--> NAME     .NAME.work of tools/tokenize_corpus.py, else .NAME-xxxxxxxx
                or --NAME to old, new to NAME-->     a kill between: unfinished_moves, finish_move
"""

import os
import re
import shutil
from pathlib import Path

from gpt4moe.data.manifest import MANIFEST_NAME, SourceManifest
from gpt4moe.durable import exchange, sync_files, sync_folder
from gpt4moe.errors import DataError


def move_in_place(new: Path, folder: Path, old: Path) -> None:
    """A source that is whole takes the place of an older one, which becomes `new` or `old`: both may be removed then.
    All of it is on the disk before.

    Where the file system cannot swap two names, there is a moment between two renames in which neither is in its place:
    a kill just then leaves both beside it, whole (unfinished_moves).
    """
    require_replaceable(folder)
    sync_files(new)
    if not folder.exists():
        os.replace(new, folder)
    elif not exchange(new, folder):
        try:
            os.replace(folder, old)
            os.replace(new, folder)
        except BaseException:  # Ctrl-C too: what called us removes both
            if not folder.exists():
                os.replace(old, folder)
            raise
    sync_folder(folder.parent)


def unfinished_moves(data_folder: Path) -> dict[str, Path]:
    """Source -> what lies beside it since a kill amid its replacement (`new` and `old`); the source is missing."""
    left = ((_LEFT.fullmatch(path.parent.parent.name), path.parent.parent) for path in data_folder.glob(_OLD_MANIFEST))
    return {found[1]: path for found, path in left if found and not (data_folder / found[1]).exists()}


_OLD_MANIFEST = f".*/old/{MANIFEST_NAME}"
_LEFT = re.compile(r"\.(.+?)(?:\.work|-[a-z0-9_]{8})")
"""Names of new_source and of corpus.build."""


def finish_move(folder: Path) -> None:
    """Puts a source in its place that a kill kept from it: the new one, whose manifest was written last."""
    beside = unfinished_moves(folder.parent).get(folder.name)
    if beside is None:
        return
    is_new = (beside / "new" / MANIFEST_NAME).is_file()
    os.replace(beside / ("new" if is_new else "old"), folder)
    sync_folder(folder.parent)
    shutil.rmtree(beside / "old", ignore_errors=True)


def require_replaceable(folder: Path) -> None:
    """Raises: DataError when what lies at a source's place is no source: it may be somebody's files."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    try:
        SourceManifest.read(folder)
    except DataError as error:
        raise DataError(
            f"{folder} is there and is no source: nothing is written in its place.",
            "Move it away, or choose another name or --out.",
        ) from error

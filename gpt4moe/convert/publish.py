"""Writes a folder so that it appears complete or not at all: into OUT.partial, which is renamed at the end. No torch.

If a conversion is killed, OUT.partial keeps the finished files. The same conversion then continues from there.
"""

import dataclasses
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gpt4moe.checkpoint.storage import FileEntry
from gpt4moe.config.checksums import sums_text
from gpt4moe.convert.copy_pipeline import Advance
from gpt4moe.convert.safetensors_file import INDEX, NewTensor, write_stream
from gpt4moe.durable import sync_file, sync_folder
from gpt4moe.errors import ConversionError, Gpt4MoeError

_PLAN = ".plan"
_LOCK = ".lock"
_DONE = ".done.json"


@dataclass(frozen=True, slots=True)
class Draft:
    """The folder OUT.partial while it is written."""

    folder: Path

    def tensors(
        self, name: str, tensors: list[NewTensor], *, dtype: str, metadata: dict[str, str], advance: Advance
    ) -> FileEntry:
        """Writes a safetensors file, unless an earlier attempt finished it."""
        note = self._path(name + _DONE)
        if note.exists():
            advance(sum(tensor.size_bytes(dtype) for tensor in tensors))
            return FileEntry(**json.loads(note.read_text()))
        entry = write_stream(self.folder / name, tensors, dtype, metadata, advance)
        temporary = f"{name}.tmp"
        self.text(temporary, json.dumps(dataclasses.asdict(entry)))  # on the disk before its name, or it may be empty
        os.replace(self.folder / temporary, note)
        return entry

    def weights(self, shards: dict[str, list[NewTensor]], dtype: str, advance: Advance, *, under: str = "") -> None:
        """Writes files of `sharded` as transformers reads them, with an index where they are several.

        Args:
            under: the folder that they lie in, with its slash.
        """
        for name, tensors in shards.items():
            self.tensors(under + name, tensors, dtype=dtype, metadata={"format": "pt"}, advance=advance)
        if len(shards) > 1:
            weight_map = {tensor.key: name for name, tensors in shards.items() for tensor in tensors}
            total = sum(tensor.size_bytes(dtype) for tensors in shards.values() for tensor in tensors)
            self.json(under + INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})

    def text(self, name: str, text: str) -> None:
        self.content(name, text.encode())

    def content(self, name: str, content: bytes) -> None:
        with self._path(name).open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    def copy(self, name: str, source: Path) -> None:
        """Copies a file."""
        shutil.copyfile(source, self._path(name))
        sync_file(self.folder / name)

    def checksums(
        self, name: str, *, is_deep: bool = True, without: Sequence[str] = (), advance: Advance | None = None
    ) -> None:
        """Writes a file of the sha256 of every other file in its folder, as `sha256sum -c` reads it.

        Args:
            is_deep: of its folders too.
            without: names of files that anybody may change.
        """
        folder = self._path(name).parent
        found = sorted(folder.rglob("*") if is_deep else folder.iterdir())
        paths = [path for path in found if path.is_file() and path.name not in (_PLAN, _LOCK, *without)]
        paths = [path for path in paths if path != self.folder / name and not path.name.endswith(_DONE)]
        self.text(name, sums_text(folder, paths, advance))

    def json(self, name: str, content: object) -> None:
        self.text(name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def _path(self, name: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        return path


@contextmanager
def published(out: Path, plan: str, size_bytes: int) -> Iterator[Draft]:
    """The draft of `out`. At the end it is renamed to `out`; after an error it is deleted.

    Args:
        plan: text that identifies source and options. A draft with another plan is deleted and begun anew.
        size_bytes: size of all files, to refuse a disk that is too small before writing.
    Raises: ConversionError when `out` exists, cannot be written, or the disk is full.
    """
    refuse_existing(out)
    folder = out.with_name(out.name + ".partial")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / _LOCK).open("w") as lock:
            _take(lock.fileno(), folder)
            _begin(folder, plan, size_bytes)
            draft = Draft(folder)
            yield draft
            for extra in [folder / _PLAN, folder / _LOCK, *folder.rglob("*" + _DONE), *folder.rglob("*.tmp")]:
                extra.unlink(missing_ok=True)
            for path in [*(path for path in folder.rglob("*") if path.is_dir()), folder]:
                sync_folder(path)
            refuse_existing(out)
            os.rename(folder, out)
            sync_folder(out.parent)
    except _Busy as error:
        raise ConversionError(f"{folder} is being written by another process.", "Wait for it to end.") from error
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise ConversionError(
            f"{out} cannot be written: {error.strerror or error}.", "Make room, or choose another folder for OUT."
        ) from error
    except Gpt4MoeError:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def refuse_existing(out: Path) -> None:
    if out.exists() or out.is_symlink():
        raise ConversionError(f"{out} exists already.", "Move it away or choose another folder for OUT.")


class _Busy(Exception):
    pass


def _take(lock: int, folder: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise _Busy(str(folder)) from error


def _begin(folder: Path, plan: str, size_bytes: int) -> None:
    note = folder / _PLAN
    if not note.exists() or note.read_text() != plan:
        for path in folder.iterdir():
            if path.name != _LOCK:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        free = shutil.disk_usage(folder).free
        if size_bytes > free:
            raise ConversionError(
                f"{folder.parent} has {free / 1e9:.3g} GB free, the conversion writes {size_bytes / 1e9:.3g} GB.",
                "Make room, or choose another folder for OUT.",
            )
        note.write_text(plan)

"""The train command whose saving meets a mishap: killed at a chosen point, held up, out of disk space."""

import errno
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt4moe.checkpoint import manifest, retention, saving, writing
from gpt4moe.checkpoint.storage import FileEntry, Piece
from gpt4moe.parallel.environment import Environment
from tests.spawn import run_ranks
from tests.training import command
from tests.training.command import SMALL, Ended

WRITE, NOTE, COMMIT, RETENTION, REMOVAL = "write", "note", "commit", "retention", "removal"
"""Half of a file written; a file written but not told; before the manifest's rename; before retention; amid removal."""


@dataclass(frozen=True, kw_only=True)
class Mishap:
    """What befalls one rank in its save number `save` (from 1)."""

    save: int
    rank: int = 0
    killed_at: str | None = None
    disk_full: bool = False
    until: tuple[Path, int] | None = None
    """Nothing is written before this file has so many lines."""
    stall_seconds: float | None = None
    """checkpoint.stall_seconds of this save alone: on a busy machine another's sync may take seconds."""
    seconds: float = 0.0
    """Writing takes this much longer."""
    refused: int = 0
    """The error number with which the disk refuses this save alone."""


def train_with(mishaps: tuple[Mishap, ...], folder: Path, *overrides: str, ranks: int = 1) -> list[Ended]:
    """tests.training.command.train with mishaps."""
    place = (f"run.root={folder.parent}", f"run.name={folder.name}")
    arguments = [*SMALL, "checkpoint.asynchronous=true", *place, *overrides]
    return run_ranks(ranks, _rank, arguments, mishaps)


def _rank(environment: Environment, arguments: list[str], mishaps: tuple[Mishap, ...]) -> Ended:
    plant(mishaps, environment.rank)
    return command.run_rank(environment, arguments, (), {})


def plant(mishaps: tuple[Mishap, ...], rank: int) -> None:
    """In this process."""
    own = {mishap.save: mishap for mishap in mishaps if mishap.rank == rank}
    count = 0
    write_file = writing.write_file

    def counted(path: Path, pieces: list[Piece], **more: Any) -> FileEntry:
        nonlocal count
        count += 1
        if count in own:
            if own[count].stall_seconds is not None:
                more["moved"].__self__.job.stall_seconds = own[count].stall_seconds  # a method of the Save
            _befall(own[count])
        return write_file(path, pieces, **more)

    saving.write_file = counted


def _befall(mishap: Mishap) -> None:
    if mishap.until is not None:
        file, lines = mishap.until
        end = time.monotonic() + 60
        while not file.exists() or len(file.read_bytes().splitlines()) < lines:
            assert time.monotonic() < end, "the training loop waited for the save"
            time.sleep(0.01)
    time.sleep(mishap.seconds)
    if mishap.refused:
        raise OSError(mishap.refused, os.strerror(mishap.refused))
    if mishap.disk_full:
        writing.HashingWriter.write = _second_call(writing.HashingWriter.write, _no_space)
    place: dict[str, tuple[Any, str, Callable[..., Any]]] = {
        WRITE: (writing.HashingWriter, "write", _second_call(writing.HashingWriter.write, _die)),
        NOTE: (saving.os, "replace", _die),
        COMMIT: (manifest.Manifest, "save", _save_without_rename),
        RETENTION: (saving, "prune", _die),
        REMOVAL: (retention.shutil, "rmtree", _die),
    }
    if mishap.killed_at is not None:
        owner, name, fatal = place[mishap.killed_at]
        setattr(owner, name, fatal)


def _die(*args: Any, **kwargs: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _save_without_rename(self: manifest.Manifest, folder: Path) -> None:
    os.replace = _die  # type: ignore[assignment]
    _manifest_save(self, folder)


_manifest_save = manifest.Manifest.save


def _no_space(*args: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _second_call(first: Callable[..., Any], then: Callable[..., Any]) -> Callable[..., Any]:
    """`first` once, `then` ever after."""
    calls = 0

    def call(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        return first(*args) if calls == 1 else then(*args)

    return call

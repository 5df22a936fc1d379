"""Saving one checkpoint: each rank writes what it owns in a thread, the first rank commits. No torch, no collective.

    rank r   rank-R.safetensors, synced  ->  rank-R.written.json, renamed into place: this rank's file is on the disk
    rank 0   once all of these are there: cover checked from the headers -> manifest.json = the commit -> retention

Ranks tell each other by files alone, because a collective of this thread could meet one of the training loop.
"""

import dataclasses
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from gpt4moe.checkpoint.block_cache import BlockCache
from gpt4moe.checkpoint.cover import Rectangle, tensor_problems
from gpt4moe.checkpoint.manifest import Manifest
from gpt4moe.checkpoint.retention import prune
from gpt4moe.checkpoint.storage import FileEntry, Piece, VerifiedFile
from gpt4moe.checkpoint.writing import write_file
from gpt4moe.errors import CheckpointError, SaveFailed, SaveStalled

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.02
_SLOWEST_POLL_SECONDS = 1.0  # listing a folder of thousands of files is work for a shared file system
_PATIENCE_SECONDS = 60.0


@dataclass(kw_only=True, slots=True)
class SaveJob:
    """What one rank writes, and where.

    folder: exists; at most suspect.json is in it.
    pieces: those of all ranks together cover every tensor exactly once.
    manifest: its `files` are empty.
    keep, keep_every, keep_healthy, suspect_steps: as in retention.prune.
    """

    folder: Path
    pieces: list[Piece]
    manifest: Manifest
    rank: int
    world_size: int
    keep: int
    keep_every: int
    keep_healthy: int = 1
    suspect_steps: int = 1
    stall_seconds: float = 0.0
    """A disk that does not answer for so long has failed; 0: it is waited for."""


class _Abandoned(Exception):
    """Ends the thread of a save that was given up."""


class Save:
    """Runs a job in a thread of its own from its creation on; ask is_done, then problem."""

    def __init__(self, job: SaveJob):
        self.job = job
        self.problem: CheckpointError | None = None
        """Its exit status is 2 where the disk refused (OSError) and 1 for an error nobody expects."""
        self.others_have_ended = False
        """Whether every other rank's save has; the training thread says so on the first rank."""
        self._deadline = float("inf")
        self._is_abandoned = False
        self._is_committed = False
        self._missing: list[int] = []
        self._moved = time.monotonic()
        # A daemon, because a disk may never answer: then the process ends without it. leave() waits for all others.
        self._thread = threading.Thread(target=self._run, name=f"save-{job.folder.name}", daemon=True)
        self._thread.start()

    @property
    def is_done(self) -> bool:
        """This rank's file is written, on the first rank committed too; or the save has failed (`problem`)."""
        return not self._thread.is_alive()

    @property
    def still_seconds(self) -> float:
        """Since the disk has answered, or this thread has waited for other ranks that still write."""
        return 0.0 if self.is_done else time.monotonic() - self._moved

    def stalled(self) -> SaveStalled | None:
        """The failure of a disk that stands still; None: it does not, or the checkpoint is whole and only older ones
        are being removed, which may take long."""
        if self._is_committed or not self._stands_still:
            return None
        what, waited = (
            "the disk has not answered",
            f"for {self.still_seconds:.0f} s (checkpoint.stall_seconds={self.job.stall_seconds:g})",
        )
        if self._missing:
            what = (
                f"the file system, which lists files late, shows no note of rank {self._missing[0]}, which has ended,"
            )
        return SaveStalled(f"{self.job.folder} could not be saved: {what} {waited}.")

    @property
    def _stands_still(self) -> bool:
        return 0 < self.job.stall_seconds < self.still_seconds

    def abandon(self) -> bool:
        """Ends without a commit, because a rank has failed. Returns: whether this rank's thread hangs in the disk; else
        it writes no more. One that hangs ends when the call in which it hangs does: of a manifest that call may still
        commit the whole checkpoint."""
        self._is_abandoned = True
        self._end(patience_seconds=0.0)
        return not self.is_done

    def leave(self) -> None:
        """Ends because the process must. This rank's file is finished; the first rank waits up to a minute for the
        files of other ranks, which may have died."""
        self._end(patience_seconds=_PATIENCE_SECONDS)

    def _end(self, *, patience_seconds: float) -> None:
        self._deadline = time.monotonic() + patience_seconds
        while not self.is_done and not self._stands_still:
            self._thread.join(_SLOWEST_POLL_SECONDS)

    def _run(self) -> None:
        job = self.job
        try:
            entry = write_file(job.folder / file_name(job.rank), job.pieces, moved=self._has_moved)
            note_written(job.folder, job.rank, entry)
            if job.rank == 0 and self._others_have_written():
                commit(job.folder, job.manifest, job.world_size, moved=self._has_moved)
                self._is_committed = True
                prune(
                    job.folder.parent, keep=job.keep, keep_every=job.keep_every, keep_healthy=job.keep_healthy,
                    suspect_steps=job.suspect_steps,
                )  # fmt: skip
        except _Abandoned:
            pass
        except CheckpointError as error:
            self.problem = error
        except OSError as error:
            self.problem = SaveFailed(f"{job.folder} could not be saved: {error}.")
        except Exception as error:  # whatever it is, the training loop must learn of it
            logger.exception("The thread that saves %s failed:", job.folder)
            self.problem = CheckpointError(
                f"{job.folder} could not be saved: {type(error).__name__}: {error}.",
                "This is a mistake in the program: please report it. Earlier checkpoints are whole.",
            )
            self.problem.exit_code = 1
        finally:
            job.pieces = []

    def _has_moved(self) -> None:
        self._moved = time.monotonic()
        if self._is_abandoned:
            raise _Abandoned

    def _others_have_written(self) -> bool:
        wait_seconds, all_ranks = _POLL_SECONDS, range(self.job.world_size)
        while len(written := {note.name for note in self.job.folder.glob("rank-*.written.json")}) < len(all_ranks):
            if time.monotonic() > self._deadline:
                return False
            self._missing = [rank for rank in all_ranks if _note_of(self.job.folder, rank).name not in written]
            if not self.others_have_ended:
                self._has_moved()
            time.sleep(wait_seconds)
            wait_seconds = min(2 * wait_seconds, _SLOWEST_POLL_SECONDS)
        self._missing = []
        self._has_moved()
        return True


def file_name(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def note_written(folder: Path, rank: int, entry: FileEntry) -> None:
    """Leaves the note by which the first rank learns that this rank's file is whole, and its hashes."""
    partial = folder / f"rank-{rank:05d}.tmp"
    partial.write_text(json.dumps(dataclasses.asdict(entry)))
    os.replace(partial, _note_of(folder, rank))


def commit(folder: Path, manifest: Manifest, world_size: int, *, moved: Callable[[], None] = lambda: None) -> None:
    """Checks that all files together hold every tensor exactly once, then writes the manifest with their hashes.

    Args: moved: called for each note and file: with thousands of ranks each call is short, and all take minutes. What
        it raises ends the commit.
    Raises: CheckpointError when they do not; OSError.
    """
    entries = []
    for rank in range(world_size):
        entries.append(FileEntry(**json.loads(_note_of(folder, rank).read_text())))
        moved()
    wrong = next(_problems(folder, entries, manifest, moved), None)
    if wrong:
        raise CheckpointError(f"{folder}: {wrong}.", "This is a mistake in the program: please report it.")
    for rank in range(world_size):
        _note_of(folder, rank).unlink()
        moved()
    dataclasses.replace(manifest, files=entries).save(folder)


def _problems(folder: Path, entries: list[FileEntry], manifest: Manifest, moved: Callable[[], None]) -> Iterator[str]:
    shapes: dict[str, tuple[int, ...]] = {}
    boxes: dict[str, list[Rectangle]] = {}
    for entry in entries:
        for name, shape, piece in VerifiedFile(folder, entry, BlockCache()).pieces():
            if shapes.setdefault(name, shape) != shape:
                yield f"{name} is of shape {shape} in one file and {shapes[name]} in another"
            boxes.setdefault(name, []).append((piece.offset, piece.shape))
        moved()
    yield from tensor_problems(shapes, boxes, manifest.tensor_names, manifest.optimizer.states)


def _note_of(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.written.json"

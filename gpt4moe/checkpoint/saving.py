"""Save: one rank's part in writing one checkpoint, in a thread of its own. No torch, no collective.

start -> write_own -> (first rank: all_written? -> commit -> retention) -> is_done, or problem says why not
"""

import threading
import time
from dataclasses import dataclass
from pathlib import Path

from gpt4moe.checkpoint.manifest import Manifest
from gpt4moe.checkpoint.retention import prune
from gpt4moe.checkpoint.storage import Piece
from gpt4moe.checkpoint.writer import all_written, commit, write_own
from gpt4moe.errors import CheckpointError

_POLL_SECONDS = 0.02
_SLOWEST_POLL_SECONDS = 1.0  # listing a folder of thousands of files is work for a shared file system
_PATIENCE_SECONDS = 60.0


@dataclass(kw_only=True, slots=True)
class SaveJob:
    """What one rank writes, and where.

    folder: made already, and empty.
    pieces: of all ranks together they hold every tensor exactly once.
    manifest: its `files` are empty.
    """

    folder: Path
    pieces: list[Piece]
    manifest: Manifest
    rank: int
    world_size: int
    keep: int
    keep_every: int


class Save:
    """Runs a job from its creation on; ask is_done, then problem."""

    def __init__(self, job: SaveJob):
        self.job = job
        self.problem: CheckpointError | None = None
        self._deadline = float("inf")
        # Not a daemon: the interpreter waits for it. leave() bounds how long that can be.
        self._thread = threading.Thread(target=self._run, name=f"save-{job.folder.name}")
        self._thread.start()

    @property
    def is_done(self) -> bool:
        """Written, on the first rank committed too; or failed. `problem` says which."""
        return not self._thread.is_alive()

    def abandon(self) -> None:
        """Ends without a commit: another rank has failed. Returns when this rank writes no more."""
        self._end(patience_seconds=0.0)

    def leave(self) -> None:
        """Ends when the process must: what this rank writes is finished; other ranks, which may have died, get a
        minute to finish theirs."""
        self._end(patience_seconds=_PATIENCE_SECONDS)

    def _end(self, *, patience_seconds: float) -> None:
        self._deadline = time.monotonic() + patience_seconds
        self._thread.join()

    def _run(self) -> None:
        job = self.job
        try:
            write_own(job.folder, job.pieces, job.rank)
            if job.rank == 0 and self._others_have_written():
                commit(job.folder, job.manifest, job.world_size)
                prune(job.folder.parent, keep=job.keep, keep_every=job.keep_every)
        except CheckpointError as error:
            self.problem = error
        except Exception as error:  # whatever it is, the training loop must hear of it
            self.problem = CheckpointError(
                f"{job.folder} could not be saved: {error}.",
                "Earlier checkpoints are whole; make room or mend the cause, then start the run again.",
            )
        finally:
            job.pieces = []

    def _others_have_written(self) -> bool:
        wait_seconds = _POLL_SECONDS
        while not all_written(self.job.folder, self.job.world_size):
            if time.monotonic() > self._deadline:
                return False
            time.sleep(wait_seconds)
            wait_seconds = min(2 * wait_seconds, _SLOWEST_POLL_SECONDS)
        return True

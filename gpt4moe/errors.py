"""The errors a user can cause. Each says what is wrong with the numbers and what to change."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

HUNG = 86
"""Exit status: ranks hung, were lost or did not come, or a disk stood still; nothing was saved; please requeue."""
INTERRUPTED = 130
"""Exit status after Ctrl-C, saved or not: whoever pressed it wants the run to rest, so nobody puts it back."""


class Gpt4MoeError(Exception):
    """Bad input, found before anything heavy starts: one line of cause, one of cure. Ends a command with status 2."""

    exit_code = 2
    have_met = False
    """Whether the ranks had met (parallel.groups.world): then every rank has this error, and rank 0 prints it."""

    told_by = 0
    """Which rank prints it, where every rank has it."""

    def __init__(self, cause: str, cure: str):
        super().__init__(f"{cause}\n{cure}")
        self.cause = cause
        self.cure = cure
        self.parts: Sequence[Gpt4MoeError] = ()
        """Where this is several errors in one (together): each of them."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Whole out of a process of a pool: Python would make it again from its text alone."""
        return _made_again, (type(self), self.args, self.__dict__)


def _made_again(kind: type[Gpt4MoeError], args: tuple[Any, ...], fields: dict[str, Any]) -> Gpt4MoeError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(fields)
    return error


class ConfigError(Gpt4MoeError):
    """A key or a value that a run cannot have."""


class LayoutError(Gpt4MoeError):
    """A layout that does not fit the world, the model or the batch."""


class DataError(Gpt4MoeError):
    """A corpus or tokenizer that is missing, damaged or of another vocabulary."""


class CheckpointError(Gpt4MoeError):
    """A checkpoint that is absent, incomplete or of another run."""


HEADER, SIZE, MISSING = -1, -2, -3
"""Of DamagedCheckpoint.place, in place of a block: the file's header is damaged, it has another size, there is none."""


class DamagedCheckpoint(CheckpointError):
    """A checkpoint whose files are not what was written: a bit has changed, or bytes are missing."""

    def __init__(self, folder: Path, cause: str, place: tuple[str, int] | None = None):
        super().__init__(cause, "Take another checkpoint of the run: this one is damaged.")
        self.folder = folder
        self.place = place
        """The file, and which block of it, or what else of it: HEADER, SIZE, MISSING. None: bytes whose hash is right
        say what cannot be, which is so for every reader."""


class UnreadableCheckpoint(CheckpointError):
    """Files of a checkpoint that the system does not let this process read: a permission, a stale mount, a disk."""

    def __init__(self, path: Path, what: str, error: OSError, block: int = HEADER):
        super().__init__(
            f"{what} cannot be read on {os.uname().nodename}: {error.strerror}.",
            "Look at its permissions, and at this node's mount and disk; or take another checkpoint.",
        )
        self.folder = path.parent
        self.place = (path.name, block)
        """As of DamagedCheckpoint."""
        self.number = error.errno or -1


class SaveFailed(CheckpointError):
    """A disk that refused a save, or stood still in it. Earlier checkpoints are whole, and so is the run."""

    def __init__(self, cause: str):
        super().__init__(cause, "Earlier checkpoints are whole; make room or mend the cause, then start the run again.")


class SaveStalled(SaveFailed):
    """A disk that stands still: after a failover it may answer the next launch."""

    exit_code = HUNG


class ConversionError(Gpt4MoeError):
    """A folder that cannot be read, or a model that the other format cannot say."""


class LaunchError(Gpt4MoeError):
    """Ranks, run folder or machine not as the run needs them."""


class DivergenceError(Gpt4MoeError):
    """The policy of a run says stop (training.update), because a loss or gradient is not finite, for example. The step
    has not changed the weights."""

    exit_code = 1
    step = 0
    """Which step it is."""


class GoBack(DivergenceError):
    """The policy of a run says: go back to an earlier checkpoint (training.go_back). An end of the run where nobody
    does it."""


class ReplicaError(Gpt4MoeError):
    """Copies of one tensor on several ranks that are not equal any more."""

    exit_code = 1


class RankEnded(Gpt4MoeError):
    """A launch ends because of one rank, which has been told already (training.watchdog): nothing more is printed."""

    def __init__(self, cause: str, status: int):
        super().__init__(cause, "")
        self.exit_code = status


class CorruptionError(Gpt4MoeError):
    """A step that was computed twice is not equal, or weights, moments or batches are not what they were: a flipped
    bit. The step has not changed the weights."""

    exit_code = 1

    def __init__(self, cause: str, cure: str, since: int):
        super().__init__(cause, cure)
        self.since = since
        """The fault came after this step."""


E = TypeVar("E", bound=Gpt4MoeError)


def check_all(*checks: Callable[[], None]) -> None:
    """Runs every check, so that a user mends in one go what would otherwise be refused in turn.

    Args:
        checks: none of which stands on another's.
    Raises: ConfigError with what all that fail say, in their order.
    """
    failed = []
    for check in checks:
        try:
            check()
        except ConfigError as error:
            failed.append(error)
    if failed:
        raise together(failed)


def together(errors: Sequence[E]) -> E:
    """Errors of one kind as one; several are numbered, so that each cure finds its cause."""
    parts = [part for error in errors for part in error.parts or (error,)]
    if len(parts) == 1:
        return errors[0]
    one = type(errors[0])(*(_numbered([getattr(part, line) for part in parts]) for line in ("cause", "cure")))
    one.parts = parts
    return one


def _numbered(lines: list[str]) -> str:
    return " ".join(f"({number}) {line}" for number, line in enumerate(lines, start=1))

"""Whether a launch goes on from the checkpoint before the newest one, because that is damaged.

    a rank's error  --its place-->  a rank of another node reads the same block
        the same there  -->  the folder is renamed, and the launch begins again from the one before
        readable there  -->  the launch ends and names the node; nothing is renamed

A node whose mount, memory or disk is at fault finds damage where there is none. To rename a checkpoint for that would
lose its steps on all nodes.
"""

import errno
import json
import logging
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from gpt4moe.checkpoint.block_cache import BlockCache
from gpt4moe.checkpoint.manifest import Manifest
from gpt4moe.checkpoint.retention import committed_steps, set_aside, step_folder
from gpt4moe.checkpoint.storage import VerifiedFile
from gpt4moe.errors import HUNG, CheckpointError, DamagedCheckpoint, Gpt4MoeError, UnreadableCheckpoint
from gpt4moe.parallel.agreement import all_reduce_max, broadcast_int, broadcast_text, raise_together
from gpt4moe.parallel.groups import ProcessGroups
from gpt4moe.training.run_folder import RunFolder

logger = logging.getLogger(__name__)

_LOST = (errno.EIO, errno.EUCLEAN, errno.EBADMSG, errno.EISDIR, errno.ELOOP, errno.ENXIO)
"""A disk or file system that has lost what was written, or no file stands there. Other numbers are of a mount, a
permission, this process."""
_FORBIDDEN = (errno.EACCES, errno.EPERM)
_CAUSE_LETTERS = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class _Finding:
    """What one rank has found in the newest checkpoint."""

    node: str
    cause: str
    file: str
    block: int
    number: int
    """Of the system's error; 0: the bytes are wrong."""
    is_certain: bool
    """Bytes whose hash is right say what cannot be: no other rank reads others."""

    @classmethod
    def of(cls, error: DamagedCheckpoint | UnreadableCheckpoint) -> "_Finding":
        number = error.number if isinstance(error, UnreadableCheckpoint) else 0
        file, block = error.place or ("", -1)
        return cls(
            node=_node(), cause=error.cause[:_CAUSE_LETTERS], file=file, block=block, number=number,
            is_certain=error.place is None,
        )  # fmt: skip

    @property
    def is_damage(self) -> bool:
        return self.number in (0, *_LOST)


def step_back(error: Gpt4MoeError, folder: RunFolder, latest: int, groups: ProcessGroups) -> bool:
    """Whether the launch may begin again, from the checkpoint before the run's latest one, because that is damaged.

    The damaged one is renamed (retention.set_aside). Where there is none before it, nothing is done: to begin at step 0
    without being told to would be worse than to end. Collective, after an error that every rank has.

    Raises: CheckpointError on every rank when one node alone finds it damaged, when it can be read by permission or
        mount only, or when it cannot be renamed.
    """
    own, world_size = step_folder(folder.checkpoints, latest), groups.layout.world_size
    finding = None
    if isinstance(error, DamagedCheckpoint | UnreadableCheckpoint) and error.folder == own:
        finding = _Finding.of(error)
    weight = 0 if finding is None else 2 if finding.is_damage else 1
    (strongest,) = all_reduce_max([weight * world_size - groups.rank if weight else 0], groups)
    if not strongest:
        return False
    _agree(finding, -strongest % world_size, own, groups)
    before = 0
    with raise_together(groups):
        if groups.is_first_rank:
            before = max((step for step in committed_steps(folder.checkpoints) if step < latest), default=0)
    before = broadcast_int(before, groups)
    if not before:
        return False
    with raise_together(groups):
        if groups.is_first_rank:
            aside = set_aside(folder.checkpoints, latest)
            logger.warning("%s\nIt is %s now. The run goes on from step %d.", error.cause, aside, before)
    return True


def _agree(finding: _Finding | None, finder: int, own: Path, groups: ProcessGroups) -> None:
    """Asks a rank of another node, where there is one, for the finding of the rank `finder`. Collective.

    Raises: CheckpointError on every rank when the checkpoint is not damaged for both.
    """
    told = _Finding(**json.loads(broadcast_text(json.dumps(asdict(finding)) if finding else "", groups, finder)))
    if told.is_certain:
        return
    world_size = groups.layout.world_size
    (nearest,) = all_reduce_max([world_size - groups.rank if told.node != _node() else 0], groups)
    if not nearest:
        if not told.is_damage:
            raise _node_alone(told, f"Rank {finder} found it, and all ranks are on this node.")
        return
    judge = world_size - nearest
    verdict = broadcast_text(_look_again(own, told, judge) if groups.rank == judge else "", groups, judge)
    if verdict:
        raise _node_alone(told, f"Rank {finder} on {told.node} found it; {verdict}.")


def _look_again(folder: Path, told: _Finding, rank: int) -> str:
    """How this rank does not find it; empty: it is damaged here too."""
    try:
        files = {entry.name: entry for entry in Manifest.load(folder).files}
        if told.file in files:
            VerifiedFile(folder, files[told.file], BlockCache()).check(told.block)
    except UnreadableCheckpoint as error:
        return "" if error.number in _LOST else f"rank {rank}: {error.cause[:_CAUSE_LETTERS].rstrip('.')}"
    except CheckpointError:
        return ""
    return f"rank {rank} on {_node()} reads it well"


def _node_alone(told: _Finding, who: str) -> CheckpointError:
    error = CheckpointError(
        f"{told.cause} {who}",
        "Nothing was renamed. Look at this node's mount, permissions, disk and memory, then start again, without the "
        "node where need be.",
    )
    error.exit_code = 2 if told.number in _FORBIDDEN else HUNG
    return error


def _node() -> str:
    return os.uname().nodename

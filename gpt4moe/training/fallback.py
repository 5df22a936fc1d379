"""Whether a launch goes on from the checkpoint before the newest one, because that is damaged.

    a rank's error  --its place-->  a rank of another node reads the same block
        damaged there too  -->  the folder is renamed, and the launch begins again from the one before
        anything else      -->  the launch ends and names both nodes; nothing is renamed

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
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Finding:
    """What one rank has found in the newest checkpoint."""

    node: str
    machine: str
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
            node=_node(), machine=_machine(), cause=error.cause, file=file, block=block, number=number,
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
    told = _broadcast(finding, finder, groups)
    if told.is_certain:
        return
    world_size = groups.layout.world_size
    (nearest,) = all_reduce_max([world_size - groups.rank if told.machine != _machine() else 0], groups)
    if not nearest:
        if not told.is_damage:
            raise _node_alone(told, f"Rank {finder} found it, and all ranks are on this node.")
        return
    judge = world_size - nearest
    verdict = broadcast_text(_look_again(own, told, judge) if groups.rank == judge else "", groups, judge)
    if verdict:
        raise _node_alone(told, f"Rank {finder} on {told.node} found it; {verdict}.")


def _broadcast(finding: _Finding | None, source: int, groups: ProcessGroups) -> _Finding:
    """The finding of the rank `source`, on every rank. Collective."""
    fields = asdict(finding) if finding else {}
    cause = fields.pop("cause", "")  # by itself: of a long one the end is lost, and the rest must be whole
    told = json.loads(broadcast_text(json.dumps(fields), groups, source))
    return _Finding(cause=broadcast_text(cause, groups, source), **told)


def _look_again(folder: Path, told: _Finding, rank: int) -> str:
    """What this rank finds instead; empty: the same place is damaged here too."""
    place = (told.file, told.block)
    try:
        files = {entry.name: entry for entry in Manifest.load(folder).files}
        if told.file in files:
            VerifiedFile(folder, files[told.file], BlockCache()).check(told.block)
    except DamagedCheckpoint as error:
        return "" if error.place == place else _instead(error, rank)
    except UnreadableCheckpoint as error:
        # A mount that went gives EIO too: only the same error in the same place is the disk of both.
        is_same = error.place == place and error.number == told.number and told.is_damage
        return "" if is_same else _instead(error, rank)
    except CheckpointError as error:
        return _instead(error, rank)
    return f"rank {rank} on {_node()} reads it well"


def _instead(error: CheckpointError, rank: int) -> str:
    return f"rank {rank} on {_node()} cannot tell: {error.cause.rstrip('.')}"


def _node_alone(told: _Finding, who: str) -> CheckpointError:
    error = CheckpointError(
        f"{told.cause} {who}",
        "Nothing was renamed. Look at the mount, permissions, disk and memory of the nodes named here, then start "
        "again, without them where need be.",
    )
    error.exit_code = 2 if told.number in _FORBIDDEN else HUNG
    return error


def _node() -> str:
    """For people."""
    return os.uname().nodename


def _machine() -> str:
    """Containers of several machines may have one name."""
    try:
        return f"{_node()} {_BOOT_ID.read_text().strip()}"
    except OSError:
        return _node()

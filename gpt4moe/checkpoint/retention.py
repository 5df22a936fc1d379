"""The checkpoints of a run folder: which exist, which is the latest, which are kept. No torch."""

import itertools
import logging
import re
import shutil
from pathlib import Path

from gpt4moe.checkpoint.health import mark, reasons
from gpt4moe.checkpoint.manifest import NAME, Manifest
from gpt4moe.data.passed_over import PassedOver, read_gone_back
from gpt4moe.errors import CheckpointError

logger = logging.getLogger(__name__)

KEEP = "keep"
"""A file of this name in a step folder: the checkpoint is never deleted. A run whose adapters need it leaves one."""
LEFT = "left-"
"""Begins the name of a checkpoint that a run went back from. The next prune removes it."""
_STEP_FOLDER = re.compile(r"step-(\d{8,})")


def step_folder(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step-{step:08d}"


def committed_steps(checkpoints: Path) -> list[int]:
    """Steps with a committed checkpoint, ascending; folders without a manifest do not count."""
    return sorted(step for step, folder in step_folders(checkpoints) if (folder / NAME).exists())


def healthy_steps(checkpoints: Path) -> list[int]:
    """Steps whose checkpoint is committed and not suspect (health), ascending."""
    return [step for step in committed_steps(checkpoints) if not reasons(step_folder(checkpoints, step))]


def mark_between(checkpoints: Path, after: int, until: int, reason: str) -> list[int]:
    """Marks the checkpoints of the steps in (after, until] as suspect, also one that is still being saved.

    Returns: their steps, ascending. Raises: OSError.
    """
    found = [(step, folder) for step, folder in sorted(step_folders(checkpoints)) if after < step <= until]
    for _, folder in found:
        mark(folder, reason)
    return [step for step, _ in found]


def step_folders(checkpoints: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every step folder, committed or not, in any order."""
    found = ((_STEP_FOLDER.fullmatch(path.name), path) for path in checkpoints.glob("step-*"))
    return [(int(match.group(1)), path) for match, path in found if match]


def find_checkpoint(path: Path) -> Path:
    """The step folder that `path` means: itself, or the one that the run of a run folder goes on from.

    Raises: CheckpointError when it is neither; DataError for a damaged record of the run's goings back.
    """
    if (path / NAME).exists():
        return path
    latest = latest_saved(path)
    if not latest:
        raise CheckpointError(
            f"{path} is neither a step folder nor a run folder with a checkpoint: it has no {NAME}.",
            "Give runs/NAME, or runs/NAME/checkpoints/step-00000100.",
        )
    return step_folder(path / "checkpoints", latest)


def latest_saved(run_folder: Path) -> int:
    """Step of the checkpoint that the run goes on from; 0: none. Raises: DataError for a damaged record."""
    left = stale_steps(run_folder)
    return max((step for step in committed_steps(run_folder / "checkpoints") if step not in left), default=0)


def stale_steps(run_folder: Path) -> list[int]:
    """Steps of the checkpoints that the run went back from: later than the last going back went to, and saved before
    it. They are there where a kill came before they were renamed. Raises: DataError for a damaged record."""
    passed_over, times = read_gone_back(run_folder) or (None, [])
    if passed_over is None or not times:
        return []
    checkpoints = run_folder / "checkpoints"
    later = [step for step in committed_steps(checkpoints) if step > times[-1].to_step]
    return [step for step in later if not _has(step_folder(checkpoints, step), passed_over)]


def _has(folder: Path, passed_over: PassedOver) -> bool:
    """Whether a checkpoint was saved by a run that passed over these samples. A damaged one counts as such: whoever
    loads it finds the damage."""
    try:
        return PassedOver.of(Manifest.load(folder).passed_over or []) == passed_over
    except CheckpointError:
        return True


def keep_for(folder: Path, run: Path) -> None:
    """Leaves a file in a checkpoint by which its own run does not delete it. Where that is not allowed: a warning.

    Args:
        run: folder of the run that needs it, for whoever reads the file.
    """
    try:
        with (folder / KEEP).open("a+") as file:
            file.seek(0)
            if f"{run.resolve()}\n" not in file.readlines():
                file.write(f"{run.resolve()}\n")
    except OSError as error:
        logger.warning(
            "%s cannot be marked as needed (%s): let its own run not delete it (checkpoint.keep)",
            folder,
            error.strerror,
        )


def set_aside(checkpoints: Path, step: int, prefix: str = "damaged-") -> Path:
    """Renames a checkpoint, so that no run takes it: a damaged one, which nothing removes then, or one that a run went
    back from (LEFT). Returns: its new path.

    Raises: CheckpointError when the system refuses.
    """
    folder = step_folder(checkpoints, step)
    suffixes = itertools.chain([""], (f".{number}" for number in itertools.count(2)))
    names = (checkpoints / f"{prefix}{folder.name}{suffix}" for suffix in suffixes)
    aside = next(path for path in names if not path.exists())
    try:
        folder.rename(aside)
    except OSError as error:
        raise CheckpointError(
            f"{folder} cannot be renamed to {aside.name}: {error.strerror}.",
            "Move it away: the run then begins before it.",
        ) from error
    if (aside / KEEP).exists():
        logger.warning("other runs need the checkpoint that is %s now (%s): they find it there", aside, KEEP)
    return aside


def renamed(folder: Path) -> list[Path]:
    """Where a step folder may be after set_aside."""
    return sorted(path for prefix in (LEFT, "damaged-") for path in folder.parent.glob(f"{prefix}{folder.name}*"))


def prune(checkpoints: Path, *, keep: int, keep_every: int, keep_healthy: int = 1, suspect_steps: int = 1) -> list[int]:
    """Removes all checkpoints but the newest `keep`, the newest healthy ones, those of steps divisible by `keep_every`,
    and those with KEEP.

    Also removes step folders without a manifest, which a killed save left; so no save may be under way. And those that
    a run went back from, but with KEEP. The manifest is removed first, so that a folder half removed is no checkpoint
    any more. A folder that cannot be removed is logged.

    Args:
        keep: 0: all.
        keep_every: 0: none is kept for this reason.
        keep_healthy: so many healthy ones stay that no step to come makes suspect, and the newest.
        suspect_steps: a wrong step makes checkpoints of less than so many steps before it suspect.
    Returns: the steps of the checkpoints removed.
    """
    committed = committed_steps(checkpoints)
    old = {step for step in committed[:-keep] if not keep_every or step % keep_every} if keep else set()
    healthy = healthy_steps(checkpoints) if old else []
    safe = [step for step in healthy if step <= committed[-1] + 1 - suspect_steps]
    old -= {*healthy[-1:], *safe[-keep_healthy:]}
    old -= {step for step in old if (step_folder(checkpoints, step) / KEEP).exists()}
    for step, folder in sorted(step_folders(checkpoints)):
        if step in old or step not in committed:
            _remove(folder)
    for folder in sorted(checkpoints.glob(f"{LEFT}step-*")):
        if _STEP_FOLDER.match(folder.name.removeprefix(LEFT)) and not (folder / KEEP).exists():
            _remove(folder)
    return sorted(old)


def _remove(folder: Path) -> None:
    try:
        (folder / NAME).unlink(missing_ok=True)
        shutil.rmtree(folder)
    except OSError as error:
        logger.warning("%s cannot be removed: %s", folder, error)
